"""What the README shows is what happens."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from nugget2d.cli.app import app
from nugget2d.modeling.parameters import attention_projections

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_prints_what_is_shown(tmp_path: Path) -> None:
    example, shown = blocks("python")[0], blocks("text")[0]
    assert len(example.strip().splitlines()) <= 12
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == shown


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (resources.files("nugget2d") / "cli" / "demo.txt").read_text(encoding="utf-8")
    (tmp_path / "book.txt").write_text(document, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUGGET2D_STORE", str(tmp_path / "store"))
    # those that run for minutes or for ever have tests of their own
    long = tuple(f"nugget2d {name}" for name in ("train", "index", "serve", "bench"))
    lines = [line.split("  #")[0] for block in blocks("sh")[1:3] for line in block.splitlines()]
    assert len(lines) >= 12
    for line in (line for line in lines if not line.startswith(long)):
        result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "copy.txt").stat().st_size > 1000
    assert "<html" in (tmp_path / "nuggets.html").read_text(encoding="utf-8")


def test_the_table_of_architectures_is_what_the_suite_covers() -> None:
    table = README.split("| `model_type` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    shown = {kind: re.findall(r"`(\w+)`", targets) for kinds, targets in rows for kind in re.findall(r"`(\w+)`", kinds)}
    lms = {lm.config.model_type: lm for lm in map(tiny.lm, tiny.KINDS)}
    assert shown.keys() == lms.keys()
    for kind, lm in lms.items():
        assert {target.split(".")[-1] for target in attention_projections(lm)} == set(shown[kind]), kind


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
