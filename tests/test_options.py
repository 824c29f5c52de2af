"""Numbers and names on the command line: what no option takes, whichever command it belongs to."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from cli_fixtures import TEXT, save_tiny_model
from nugget2d import Memory, Nugget2D
from nugget2d.cli.app import app
from nugget2d.config import Frozen
from nugget2d.errors import InputError
from nugget2d.files import atomic_write
from nugget2d.methods.budget import Budget
from nugget2d.methods.options import CompressOptions
from test_cli import fails, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, newline="")
    return path


def _options(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every option and argument below a command, with the words that lead to it."""
    for name, below in getattr(command, "commands", {}).items():
        yield from _options(below, *names, name)
    yield from ((names, parameter) for parameter in command.params)


OPTIONS = list(_options(typer.main.get_command(app)))


def _words(names: tuple[str, ...], option: Any) -> list[str]:
    """A command with what it requires, and a last option to be given."""
    required = [one for path, one in OPTIONS if path == names and one.required and one is not option]
    words = [(*(one.opts[:1] if one.opts[0].startswith("-") else ()), "x") for one in required]
    return [*names, *(word for pair in words for word in pair), option.opts[0]]


# ---- numbers ----

FLOATS = [(names, one) for names, one in OPTIONS if one.type_descriptor.annotation is float]


def test_there_are_options_to_test() -> None:
    assert {name for _, one in FLOATS for name in one.opts} >= {"--ratio", "--temperature", "--time-limit", "--share"}


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(("names", "option"), FLOATS, ids=lambda value: " ".join(value) if type(value) is tuple else "")
def test_every_number_is_finite(names: tuple[str, ...], option: Any, number: str) -> None:
    """Before anything is read; what a range refuses is wrong usage, as all that is out of it."""
    result = CliRunner().invoke(app, [*_words(names, option), number])
    one_line = f"error: {option.opts[0]} takes a finite number, not {float(number)}\n"
    assert result.exit_code in (1, 2) and result.stdout == ""
    assert result.stderr == one_line if result.exit_code == 1 else option.opts[0] in result.stderr


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_budgets_and_records_are_finite(number: float, llama: Nugget2D) -> None:
    for name in ("ratio", "nuggets", "nbytes"):
        with pytest.raises(InputError, match=name):
            Budget(**{name: number})
        with pytest.raises(InputError, match=name):
            CompressOptions.of(llama, **{name: number})
    with pytest.raises(InputError, match="target_accuracy"):
        CompressOptions.of(llama, target_accuracy=number)
    with pytest.raises(InputError, match="ratio must be at least 1"):
        llama.stream(20, ratio=number)
    with pytest.raises(InputError, match="ratio must be from 1"):
        llama.calibrate(TEXT, number)


def test_every_record_is_finite() -> None:
    class Number(Frozen):
        value: float

    with pytest.raises(ValidationError, match="finite"):
        Number(value=math.inf)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_other_options_of_a_method_are_finite(value: str, source: Path, model: str, tmp_path: Path) -> None:
    command = ["compress", source, "-o", tmp_path / "a", "--model", model]
    fails(*command, "--set", f"target_accuracy={value}", saying="target_accuracy: Input should be a finite number")


@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_seeds_out_of_range_name_it(command: str, seed: int) -> None:
    others = ["a.nugget", "--prompt", "a"] if command == "generate" else []
    result = run(command, *others, "--seed", seed, code=2)
    assert "Invalid value for '--seed': Input should be" in result.stderr
    assert str(2**63 - 1 if seed > 0 else -(2**63)) in result.stderr


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_seeds_in_range_work(seed: int, source: Path, model: str, tmp_path: Path) -> None:
    Nugget2D.from_pretrained(model).compress(TEXT, ratio=4).save(tmp_path / "m.nugget")
    command = ["generate", tmp_path / "m.nugget", "--prompt", "a", "--temperature", 1, "--max-new-tokens", 4]
    assert run(*command, "--seed", seed).stdout == run(*command, "--seed", seed).stdout


# ---- names of files to write ----


@pytest.mark.parametrize(
    ("names", "option"),
    [(names, one) for names, one in OPTIONS if {"--out", "--html"} & set(one.opts)],
    ids=lambda value: " ".join(value) if type(value) is tuple else "",
)
def test_standard_output_is_no_file(names: tuple[str, ...], option: Any, monkeypatch, tmp_path: Path) -> None:
    """Before, a file of the name - was written."""
    monkeypatch.chdir(tmp_path)
    fails(*_words(names, option), "-", saying=f"{option.opts[0]} takes a name, and - is not standard output")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a\nb\x1b[31m", os.fsdecode(b"caf\xe9"), "x" * 242])
def test_any_name_of_the_file_system_can_be_written(name: str, source: Path, model: str, tmp_path: Path) -> None:
    run("compress", source, "-o", tmp_path / name, "--model", model)
    assert Memory.load(tmp_path / name).num_chars == len(TEXT)
    with pytest.raises(RuntimeError), atomic_write(tmp_path / name):
        raise RuntimeError
    assert {path.name for path in tmp_path.iterdir()} == {name, source.name}  # nothing else is left
