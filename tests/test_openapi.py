"""Whatever a client sends, it gets an answer that the OpenAPI document tells of, and never a 500."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from nugget2d import Nugget2D
from serving import Running, serving

pytestmark = pytest.mark.e2e

# of what can be asked of these nothing is wrong by form
PLAIN = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/v1/memories/{id}"),
    ("DELETE", "/v1/memories/{id}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/memories"),
    ("GET", "/v1/memories"),
    ("POST", "/v1/memories/file"),
]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(*operation, RIGHT) for operation in OPERATIONS + PLAIN] + [(*operation, WRONG) for operation in OPERATIONS]


@pytest.fixture(scope="module")
def server(llama: Nugget2D, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(llama, tmp_path_factory.mktemp("store"), max_tokens=4) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Running) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_no_operation_is_left_out(document: schemathesis.BaseSchema) -> None:
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in document.get_all_operations()}
    assert found == {*OPERATIONS, *PLAIN}


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_answers_are_as_documented(
    document: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    statuses = set()

    @settings(max_examples=10, suppress_health_check=list(HealthCheck))
    @given(document[path][method].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        # a name that is nobody's and a text that is empty are right by form
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        statuses.add(response.status_code)

    check()
    assert statuses and max(statuses) < 500
