"""What a command costs before it does anything: help and lists load no tensor library."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nugget2d.methods.registry import METHODS, method_class

pytestmark = pytest.mark.e2e

HEAVY = ("torch", "transformers", "safetensors", "numpy", "pydantic")
# `nugget2d` with its arguments, then what was loaded of HEAVY
COMMAND = f"""\
import sys
from nugget2d.cli.app import main
try:
    main()
except SystemExit:
    pass
print(sorted(set({HEAVY}) & set(sys.modules)))"""
LEAST = "import typer.rich_utils"  # what any program with such help must load


def seconds(*arguments: str, code: str) -> tuple[float, str]:
    """How long a fresh interpreter takes, and what it prints."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def test_help_takes_under_half_a_second() -> None:
    """The best of several turns, and less of a machine that is slow or busy: loading rich took 0.13 s when written."""
    turns = [(seconds("--help", code=COMMAND)[0], seconds(code=LEAST)[0]) for _ in range(5)]
    helping, loading = map(min, zip(*turns, strict=True))
    assert helping < 0.5 * max(1.0, loading / 0.15)
    assert helping < 3 * loading


@pytest.mark.parametrize("arguments", ["--help", "--version", "compress --help", "serve --help", "store add --help"])
def test_help_loads_nothing_heavy(arguments: str) -> None:
    *printed, loaded = seconds(*arguments.split(), code=COMMAND)[1].splitlines()
    assert printed
    # typer itself loads pydantic where a command has options
    assert loaded == "[]" or (" " in arguments and loaded == "['pydantic']")


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(shutil.copytree(Path(__file__).parent / "data" / "v1" / "store", tmp_path / "store"))


@pytest.mark.parametrize("command", ["list", "list --json --tag sea", "show cb16", "search ships", "rm cb16", "gc"])
def test_a_store_is_listed_without_torch(command: str, store: str) -> None:
    printed = seconds("store", *command.split(), "--store", store, code=COMMAND)[1]
    assert printed.splitlines()[-1] == "['pydantic']"


def test_a_list_takes_under_half_a_second(store: str) -> None:
    """As above; pydantic and rich take most of it."""
    turns = [(seconds("store", "list", "--store", store, code=COMMAND)[0], seconds(code=LEAST)[0]) for _ in range(5)]
    listing, loading = map(min, zip(*turns, strict=True))
    assert listing < 0.5 * max(1.0, loading / 0.15)


def test_what_is_loaded_is_noticed() -> None:
    """Else the test above would pass whatever the command imports."""
    assert seconds("--version", code=f"import numpy\n{COMMAND}")[1].splitlines()[-1] == "['numpy']"


def test_methods_lists_every_row() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nugget2d", "methods"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": ""},
    )
    header, *rows = done.stdout.splitlines()
    for column in ("name", "needs training", "payload", "query-agnostic", "options", "source"):
        assert column in header
    by_name = {row.split()[0]: row for row in rows}
    assert list(by_name) == list(METHODS)
    for name, row in by_name.items():
        kind = method_class(name)
        cells = [name, "yes" if kind.needs_training else "no", kind.payload, "yes" if kind.query_agnostic else "no"]
        assert row.split()[:4] == cells
        assert kind.source in row and ", ".join(kind.model_fields) in row
