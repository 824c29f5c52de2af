"""The server against the official client of the OpenAI API: what it sends by itself is taken, what it gets is whole."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

import tiny
from nugget2d import Nugget2D
from nugget2d.server.api_errors import server_sent
from nugget2d.server.replies import CompletionReply
from nugget2d.server.schemas import ChatRequest, CompletionRequest
from serving import Running, serving

pytestmark = pytest.mark.e2e

USER = {"role": "user", "content": "Who bends?"}
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server(llama: Nugget2D, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(llama, tmp_path_factory.mktemp("store")) as running:
        yield running


def test_the_role_is_in_the_first_delta_only(server: Running) -> None:
    chat = server.client().chat.completions
    chunks = [chunk.choices[0] for chunk in chat.create(messages=[USER], stream=True, **ASK)]
    assert [chunk.delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert chunks[0].delta.content == "" and len(chunks) > 3
    assert "role" not in chunks[1].delta.model_dump(exclude_unset=True)
    whole = chat.create(messages=[USER], **ASK).choices[0].message
    with chat.stream(messages=[USER], **ASK) as stream:
        message = stream.until_done().current_completion_snapshot.choices[0].message
    assert (message.role, message.content) == ("assistant", whole.content)


def test_an_empty_answer_has_a_role_too(server: Running) -> None:
    chat = server.client().chat.completions
    text = chat.create(messages=[USER], **ASK).choices[0].message.content
    first, last = (c.choices[0] for c in chat.create(messages=[USER], stream=True, stop=text[0], **ASK))
    assert (first.delta.role, first.delta.content, last.finish_reason) == ("assistant", "", "stop")


def test_events_have_no_line_ends_inside() -> None:
    text = "a\u2028b\u2029c\u0085d\x0b\x1c😀"
    event = server_sent(CompletionReply("tiny").chunk(text, None))
    line, end = event.splitlines()
    assert event.isascii() and end == ""
    assert json.loads(line.removeprefix("data: "))["choices"][0]["text"] == text


# ---- parameters ----

NEUTRAL_OF_BOTH: dict[str, Any] = {
    "frequency_penalty": 0,
    "logit_bias": {},
    "n": 1,
    "presence_penalty": 0.0,
    "stop": None,
    "seed": None,
    "stream_options": None,
    "user": "me",
}
NEUTRAL: dict[str, Any] = NEUTRAL_OF_BOTH | {"best_of": 1, "echo": False, "logprobs": None, "suffix": ""}
NEUTRAL_OF_CHAT: dict[str, Any] = NEUTRAL_OF_BOTH | {
    "audio": None,
    "function_call": "none",
    "functions": [],
    "logprobs": False,
    "metadata": {"run": "7"},
    "modalities": ["text"],
    "moderation": None,
    "parallel_tool_calls": True,
    "prediction": None,
    "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "in_memory",
    "reasoning_effort": "none",
    "response_format": {"type": "text"},
    "safety_identifier": "a",
    "service_tier": "auto",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": None,
    "verbosity": "medium",
    "web_search_options": None,
}


def test_every_parameter_of_the_client_is_known() -> None:
    own = {"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stream"}
    for parameters, schema, neutral in (
        (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest, NEUTRAL),
        (chat_create_params.CompletionCreateParamsStreaming, ChatRequest, NEUTRAL_OF_CHAT),
    ):
        names = set(parameters.__annotations__)
        assert names <= set(schema.model_fields)
        assert names - own == set(neutral)


def test_neutral_values_are_taken(server: Running) -> None:
    client = server.client()
    asked: dict[str, Any] = {"prompt": "The keeper", **ASK}
    assert client.completions.create(**asked, **NEUTRAL).choices == client.completions.create(**asked).choices
    plain = client.chat.completions.create(messages=[USER], **ASK).choices
    assert client.chat.completions.create(messages=[USER], **ASK, **NEUTRAL_OF_CHAT).choices == plain
    absent = dict.fromkeys(NEUTRAL_OF_CHAT)  # null, as programs send what they have no value for
    assert client.chat.completions.create(messages=[USER], **ASK, **absent).choices == plain
    auto = {"tool_choice": "auto", "function_call": "auto"}
    assert client.chat.completions.create(messages=[USER], **ASK, **auto).choices == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("logprobs", True),
        ("top_logprobs", 5),
        ("store", True),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "a"}),
        ("reasoning_effort", "high"),
        ("stream_options", {"include_obfuscation": True}),
    ],
)
def test_other_values_are_refused_by_name(server: Running, field: str, value: object) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=f"{field}.*: not supported") as refused:
        server.client().chat.completions.create(messages=[USER], **ASK, **{field: value})
    assert refused.value.param.startswith(field)


def test_a_reply_can_be_sent_back(server: Running) -> None:
    chat = server.client().chat.completions
    reply = chat.create(messages=[USER], **ASK).choices[0].message
    for sent in (reply, reply.model_dump()):
        assert chat.create(messages=[USER, sent, USER], **ASK).choices[0].message.content
    empty = {"role": "assistant", "content": None, "tool_calls": [], "annotations": []}
    both = chat.create(messages=[USER, empty], **ASK), chat.create(messages=[USER, {"role": "assistant"}], **ASK)
    assert both[0].choices == both[1].choices
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for wrong in ({"tool_calls": [call]}, {"refusal": "no"}, {"audio": {"id": "a"}}, {"function_call": {}}):
        with pytest.raises(openai.UnprocessableEntityError, match=f"{next(iter(wrong))}: not supported"):
            chat.create(messages=[USER, empty | wrong], **ASK)
    with pytest.raises(openai.UnprocessableEntityError, match="content"):
        chat.create(messages=[USER | {"content": None}], **ASK)


def test_a_list_of_one_prompt_is_that_prompt(server: Running) -> None:
    complete = server.client().completions.create
    wanted = complete(prompt="The keeper", **ASK).choices
    assert complete(prompt=["The keeper"], **ASK).choices == wanted
    for several in (["a", "b"], [], [1, 2], [[1]]):
        with pytest.raises(openai.UnprocessableEntityError, match="prompt: one text in a request"):
            complete(prompt=several, **ASK)
    with pytest.raises(openai.BadRequestError, match="nothing to continue"):
        complete(prompt=None, **ASK)


# ---- HTTP ----


def test_head_is_answered_where_get_is_and_any_405_says_what_is(server: Running) -> None:
    http = server.http()
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/tiny", "/v1/memories", "/openapi.json"):
        response = http.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert int(response.headers["content-length"]) > 0
    for method, path, allowed in (
        ("OPTIONS", "/v1/memories", "HEAD, GET, POST"),
        ("PUT", "/v1/memories/x", "HEAD, GET, DELETE"),
        ("HEAD", "/v1/completions", "POST"),
        ("POST", "/health", "HEAD, GET"),
        ("DELETE", "/openapi.json", "HEAD, GET"),
    ):
        response = http.request(method, path)
        assert (response.status_code, response.headers.get("allow")) == (405, allowed)


def test_a_key_is_its_bytes(llama: Nugget2D, tmp_path: Any) -> None:
    with serving(llama, tmp_path, ("schlüssel-à", "öl\udcff")) as server:  # the second: not UTF-8 in the environment
        for key, status in (
            ("schlüssel-à".encode(), 200),
            (b"\xc3\xb6l\xff", 200),
            ("schlüssel-à".encode("latin-1"), 401),
        ):
            headers = {b"Authorization": b"Bearer " + key}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("head", "status"),
    [("GET /health", 200), ("GET /metrics", 200), ("POST /nothing", 404), ("POST /v1/completions", 401)],
)
def test_a_body_that_is_not_used_is_not_waited_for(llama: Nugget2D, tmp_path: Any, head: str, status: int) -> None:
    with serving(llama, tmp_path, ("secret",)) as server:
        address = (httpx.URL(server.url).host, httpx.URL(server.url).port)
        with socket.create_connection(address, timeout=5) as client:
            client.sendall(f"{head} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n".encode())
            assert client.recv(100).startswith(f"HTTP/1.1 {status} ".encode())


def test_what_a_client_sent_is_repeated_in_part_only(server: Running, capfd: pytest.CaptureFixture[str]) -> None:
    long = "m" * 3_000_000
    http = server.http()
    bodies: list[dict[str, Any]] = [
        {"model": long, "prompt": "a"},
        {"model": "tiny", "prompt": "a", long: 1},
        {"model": "tiny", "memory_ids": [long]},
    ]
    for body in bodies:
        response = http.post("/v1/completions", json=body)
        assert response.status_code in (404, 422) and 500 < len(response.content) < 4000
    role = http.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": long, "content": "a"}]})
    assert role.status_code == 422 and len(role.content) < 4000
    assert http.post("/v1/completions", json=bodies[0]).json()["error"]["message"].endswith("here, only 'tiny'")
    assert http.request("X" * 30_000, f"/{tiny.TEXT[:20]}{'y' * 20_000}").status_code == 404
    assert max(map(len, capfd.readouterr().err.splitlines())) < 10_000
