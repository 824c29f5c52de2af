"""Former names: each still works, warns once with the current name at the user's line, and is refused beside it."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import tiny
from cli_fixtures import TEXT, save_tiny_model
from nugget2d import Memory, Nugget2D, errors
from nugget2d.cli.app import app
from nugget2d.cli.options import RENAMED
from nugget2d.config import NuggetConfig
from nugget2d.store import MemoryStore
from nugget2d.streaming.stream import Stream


@contextmanager
def warned(message: str) -> Iterator[None]:
    """Exactly one deprecation warning within the block, which points at this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [(str(one.message), one.filename) for one in caught if one.category is DeprecationWarning]
    assert found == [(message, __file__)]


@pytest.fixture(scope="module")
def model() -> Nugget2D:
    return tiny.trained("llama", "copies")


@pytest.fixture(scope="module")
def memory(model: Nugget2D) -> Memory:
    return model.compress(TEXT, ratio=4)


def _stream(model: Nugget2D, folder: Path, **options: Any) -> int:
    return model.stream(**options).recent_window


def _constructed(model: Nugget2D, folder: Path, **options: Any) -> int:
    return Stream(model, ratio=4, max_nuggets=None, chunk=None, memory=None, **options).recent_window


def _append(model: Nugget2D, folder: Path, **options: Any) -> int:
    return model.stream(20, 4).append(**options)


def _append_scored(model: Nugget2D, folder: Path, **options: Any) -> int:
    return len(model.stream(20, 4).append_scored(**options))


def _score(model: Nugget2D, folder: Path, **options: Any) -> float:
    return model.stream(20, 4).score(**options)


def _compressed(model: Nugget2D, folder: Path, **options: Any) -> object:
    return model.compress(TEXT, **options).method


def _stored(model: Nugget2D, folder: Path, **options: Any) -> object:
    with MemoryStore(folder / "store") as store:
        return store.add(model, TEXT, **options).settings


def _saved(model: Nugget2D, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return (folder / "README.md").read_text()


KEYWORDS: list[tuple[Callable[..., object], str, str, object]] = [
    (_stream, "tau", "recent_window", 20),
    (_constructed, "tau", "recent_window", 20),
    (_append, "piece", "tokens", [5, 6, 7]),
    (_append_scored, "piece", "tokens", [5, 6, 7]),
    (_score, "piece", "tokens", [5, 6, 7]),
    (_compressed, "quality", "target_accuracy", 0.01),
    (_compressed, "refine", "optimize_steps", 1),
    (_stored, "quality", "target_accuracy", 0.01),
    (_saved, "figures", "metrics", {"accuracy_4x": 0.875}),
]


@pytest.mark.parametrize(("call", "old", "new", "value"), KEYWORDS)
def test_keywords(
    call: Callable[..., object], old: str, new: str, value: object, model: Nugget2D, tmp_path: Path
) -> None:
    with warned(f"{old}= is now {new}="):
        got = call(model, tmp_path / "a", **{old: value})
    assert got == call(model, tmp_path / "b", **{new: value})
    with pytest.raises(errors.InputError, match=f"{new} is given twice"):
        call(model, tmp_path / "c", **{old: value, new: value})


def test_a_search_with_its_model_first(model: Nugget2D, tmp_path: Path) -> None:
    with MemoryStore(tmp_path) as store:
        store.add(model, TEXT, ratio=4)
        with warned("search(model, ...) is now search(..., model=model)"):
            found = store.search(model, "lighthouse", top=3)  # type: ignore[misc, arg-type]
        assert found == store.search("lighthouse", top=3, model=model) != []
        with pytest.raises(errors.InputError, match="model is given twice"):
            store.search(model, "lighthouse", model=model)  # type: ignore[misc, arg-type]


def test_attributes(model: Nugget2D, memory: Memory) -> None:
    stream = model.stream(20, 4)
    stream.append([5, 6, 7])
    for owner, name, old, new, value in (
        (stream, "Stream", "tau", "recent_window", 20),
        (stream, "Stream", "num_whole", "num_uncompressed", 3),
        (memory, "Memory", "quality", "accuracy", None),
        (tiny.make("gpt2", "lora"), "Network", "reach", "max_positions", tiny.make("gpt2", "lora").max_positions),
    ):
        with warned(f"{name}.{old} is now {new}"):
            assert getattr(owner, old) == getattr(owner, new) == value


def test_the_warning_has_a_former_name() -> None:
    assert errors.QualityWarning is errors.AccuracyWarning


def test_the_former_key_of_the_configuration_is_read_not_written(tmp_path: Path) -> None:
    model = tiny.make("llama", "copies", token_readout=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "nugget2d.json"
    fields = json.loads(path.read_text())
    assert fields.pop("token_readout") is True and "slots" not in fields
    path.write_text(json.dumps(fields | {"slots": True}))
    assert Nugget2D.from_pretrained(tmp_path).config.token_readout
    with pytest.raises(ValidationError):
        NuggetConfig.model_validate({"slots": True, "token_readout": True})


def test_nano_is_read_with_its_former_key() -> None:
    assert Nugget2D.from_pretrained("nano").config.token_readout


# ---- command line ----


@pytest.mark.parametrize(("command", "options"), [("chat", {"tau"}), ("compress", {"quality", "refine"})])
def test_former_options_are_not_in_the_help(command: str, options: set[str]) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    for old in options:
        assert f"--{old} " not in shown and f"--{RENAMED[old]}" in shown


def test_former_options_work(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path))
    with warnings.catch_warnings():
        old = CliRunner().invoke(app, ["chat", "--model", model, "--tau", "0"], input="")
        new = CliRunner().invoke(app, ["chat", "--model", model, "--recent-window", "0"], input="")
    assert (old.exit_code, new.exit_code) == (1, 1)
    assert old.stderr == f"warning: --tau is now --recent-window\n{new.stderr}"
    assert "recent_window must be at least 1 token, got 0" in new.stderr


def test_every_former_option_has_a_current_one() -> None:
    for command, old in (("chat", "tau"), ("compress", "quality"), ("index", "refine"), ("serve", "slots")):
        result = CliRunner().invoke(app, [command, f"--{old}", "1", "--help"])
        assert result.exit_code == 0 and f"--{old} is now --{RENAMED[old]}" in result.stderr
    assert set(RENAMED) == {"tau", "quality", "refine", "slots"}
