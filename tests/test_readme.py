"""What the README shows is what happens."""

import re
import shlex
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
from typer.testing import CliRunner

import methods_table
import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.cli.app import app
from nugget2d.modeling.parameters import attention_projections

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def printed(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example of that number prints in a folder."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(blocks("python")[number], "README.md", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_a_real_lm_prints_what_is_shown(
    smollm2: Path,
    shared_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NUGGET2D_CACHE", str(shared_cache))
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(smollm2)
    number = r"\d+\.\d\d"
    made, shown = printed(0, tmp_path, monkeypatch, capsys), blocks("text")[0]
    assert re.sub(number, "", made) == re.sub(number, "", shown)
    losses, expected = (list(map(float, re.findall(number, text))) for text in (made, shown))
    assert len(losses) == 6 and losses == pytest.approx(expected, abs=0.015)  # rounding differs between machines


@pytest.mark.slow
def test_the_example_of_a_compressor_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(1, tmp_path, monkeypatch, capsys) == blocks("text")[1]


def test_the_table_of_methods_is_the_registry() -> None:
    assert methods_table.filled(README) == README, "run `python docs/methods_table.py`"
    assert methods_table.filled(README.replace("| `knorm` |", "| `other` |")) == README


@pytest.mark.e2e
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (resources.files("nugget2d") / "cli" / "demo.txt").read_text(encoding="utf-8")
    (tmp_path / "book.txt").write_text(document, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUGGET2D_STORE", str(tmp_path / "store"))
    # those that run for minutes or for ever have tests of their own
    long = tuple(f"nugget2d {name}" for name in ("train", "index", "serve", "bench"))
    lines = [line.split("  #")[0] for block in blocks("sh") for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("nugget2d ") and not line.startswith(long)]
    assert len(lines) >= 10
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "copy.txt").stat().st_size > 1000
    assert "<html" in (tmp_path / "nuggets.html").read_text(encoding="utf-8")


def test_streams_are_read_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Nugget2D) -> None:
    (example,) = (block for block in blocks("python") if "model.stream(" in block)
    (tmp_path / "book.txt").write_text(tiny.TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"model": llama})
    assert Memory.load("book.nugget").num_tokens > 200


def test_the_table_of_architectures_is_what_the_suite_covers() -> None:
    table = README.split("| `model_type` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    shown = {kind: re.findall(r"`(\w+)`", targets) for kinds, targets in rows for kind in re.findall(r"`(\w+)`", kinds)}
    lms = {lm.config.model_type: lm for lm in map(tiny.lm, tiny.KINDS)}
    assert shown.keys() == lms.keys()
    for kind, lm in lms.items():
        assert {target.split(".")[-1] for target in attention_projections(lm)} == set(shown[kind]), kind


def test_make_targets_exist() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    page = (ROOT / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make (\w+)", README + page, flags=re.MULTILINE))
    assert {"demo", "quick", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
