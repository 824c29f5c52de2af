"""The command line: what it prints, what it writes, and one clear line for everything that can go wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner, Result

from cli_fixtures import TEXT, save_tiny_model
from nugget2d import Memory, Nugget2D, __version__
from nugget2d.cli import options
from nugget2d.cli.app import app
from nugget2d.config import SelectionName
from nugget2d.indexing.run import ENGINES, EngineName
from nugget2d.memory.states import StoreDtype

SCRIPT = [sys.executable, "-c", "from nugget2d.cli.app import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="module")
def memories(model: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plain.nugget and exact.nugget."""
    folder = tmp_path_factory.mktemp("memories")
    run("compress", source, "-o", folder / "plain.nugget", "--model", model, "--ratio", 4)
    run("compress", source, "-o", folder / "exact.nugget", "--model", model, "--ratio", 4, "--exact")
    return folder


@pytest.fixture(autouse=True)
def _restore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        yield


def run(*arguments: object, stdin: bytes | None = None, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object, saying: str, stdin: bytes | None = None) -> None:
    """One line on standard error, nothing on standard output, exit code 1."""
    result = run(*arguments, stdin=stdin, code=1)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    assert saying in result.stderr
    assert result.stdout == ""


# ---- start ----


@pytest.mark.e2e
def test_the_package_is_the_command() -> None:
    asked = [sys.executable, "-m", "nugget2d", "--version"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == run("--version").stdout


def test_version() -> None:
    assert run("--version").stdout == f"nugget2d {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        "compress",
        "reconstruct",
        "generate",
        "chat",
        "inspect",
        "index",
        "store",
        "serve",
        "train",
        "demo",
        "bench",
        "doctor",
    ],
)
def test_every_command_has_help(command: str) -> None:
    assert "Usage" in run(command, "--help").stdout


def test_choices_are_those_of_the_core() -> None:
    assert get_args(options.Dtype) == get_args(StoreDtype)
    assert get_args(options.Selection) == get_args(SelectionName)
    assert get_args(options.Engine) == get_args(EngineName) == tuple(ENGINES)


@pytest.mark.parametrize("arguments", [["compress"], ["compress", "a"], ["nothing"], ["generate", "a", "--seed", "x"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    run(*arguments, code=2)


# ---- compress and reconstruct ----


def test_compress_reports_its_metrics(model: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.nugget"
    printed = run("compress", source, "-o", out, "--model", model, "--ratio", 4, "--exact").stdout
    memory = Memory.load(out)
    assert memory.dtype == "int8" and memory.exact is not None
    for figure in (
        f"{memory.num_tokens:,}",
        f"{memory.num_nuggets:,}",
        f"{memory.ratio:.2f}",
        f"{memory.nbytes:,} of {memory.full_nbytes:,} bytes",
        f"{out.stat().st_size:,} bytes",
        f"{memory.exact.patch_nbytes:,} bytes",
        f"{memory.exact.copy_nbytes:,} bytes",
        "seconds",
    ):
        assert figure in printed
    assert [path.name for path in tmp_path.iterdir()] == ["a.nugget"]
    run("compress", source, "-o", out, "--model", model, "--dtype", "bfloat16", "--force")
    assert Memory.load(out).dtype == "bfloat16"


def test_exact_text_comes_back_byte_for_byte(memories: Path, tmp_path: Path) -> None:
    """CRLF, NUL, emoji, no newline added; to standard output and to a file."""
    assert run("reconstruct", memories / "exact.nugget").stdout_bytes == TEXT.encode()
    run("reconstruct", memories / "exact.nugget", "-o", tmp_path / "back.txt")
    assert (tmp_path / "back.txt").read_bytes() == TEXT.encode()


def test_plain_memory_gives_what_the_model_reconstructs(model: str, memories: Path) -> None:
    text = Nugget2D.from_pretrained(model).reconstruct(Memory.load(memories / "plain.nugget"))
    assert run("reconstruct", memories / "plain.nugget").stdout_bytes == text.encode()


def test_standard_input(model: str, tmp_path: Path) -> None:
    run("compress", "-", "-o", tmp_path / "a.nugget", "--model", model, "--exact", stdin=b"one\r\ntwo")
    assert run("reconstruct", tmp_path / "a.nugget").stdout_bytes == b"one\r\ntwo"


def test_selection_is_passed_on(model: str, source: Path, tmp_path: Path) -> None:
    run("compress", source, "-o", tmp_path / "a.nugget", "--model", model, "--selection", "even")
    memory = Memory.load(tmp_path / "a.nugget")
    expected = Nugget2D.from_pretrained(model).compress(source.read_bytes().decode(), selection="even")
    assert memory.positions == expected.positions


def test_fallback_is_one_warning_line(memories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a machine that rounds differently: every guess goes wrong
    monkeypatch.setattr("nugget2d.inference.reconstruction._replay", lambda model, rows: [[0] for _ in rows])
    result = run("reconstruct", memories / "exact.nugget")
    assert result.stdout_bytes == TEXT.encode()
    assert result.stderr.startswith("warning: ") and result.stderr.count("\n") == 1
    assert "lossless copy" in result.stderr


# ---- generate ----


def test_generate_streams_what_the_model_says(model: str, memories: Path) -> None:
    arguments = ["generate", memories / "plain.nugget", "--prompt", "The keeper", "--max-new-tokens", 8]
    expected = Nugget2D.from_pretrained(model).generate(
        "The keeper", memory=Memory.load(memories / "plain.nugget"), max_new_tokens=8
    )
    assert run(*arguments).stdout == expected + "\n"


def test_sampling_repeats_with_its_seed(memories: Path) -> None:
    arguments = ["generate", memories / "plain.nugget", "--prompt", "a", "--max-new-tokens", 12, "--temperature", 1.5]
    first, again, other = (run(*arguments, "--seed", seed).stdout_bytes for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("temperature", ["1e-320", "1e-46", "1e-40"])
def test_tiny_temperatures_are_greedy(model: str, memories: Path, temperature: str) -> None:
    generate = ["generate", memories / "plain.nugget", "--prompt", "The keeper", "--max-new-tokens", 8]
    chat = ["chat", "--model", model, "--recent-window", 20, "--max-new-tokens", 8]
    for arguments in (generate, chat):
        wanted = run(*arguments, stdin="The lamp\n").stdout_bytes
        assert run(*arguments, "--temperature", temperature, stdin="The lamp\n").stdout_bytes == wanted


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf"])
def test_wrong_temperature(memories: Path, temperature: str) -> None:
    fails("generate", memories / "plain.nugget", "--prompt", "a", "--temperature", temperature, saying="temperature")


def test_wrong_number_of_tokens(memories: Path) -> None:
    fails("generate", memories / "plain.nugget", "--prompt", "a", "--max-new-tokens", 0, saying="max_new_tokens")


# ---- inspect ----


def test_inspect_text_and_memory(model: str, source: Path, memories: Path, tmp_path: Path) -> None:
    of_text = json.loads(run("inspect", source, "--json", "--model", model, "--ratio", 4).stdout_bytes)
    of_memory = json.loads(run("inspect", memories / "exact.nugget", "--json").stdout_bytes)
    # exact mode measures what it has to patch
    assert of_text["accuracy"] is None and of_memory["accuracy"] is not None
    assert of_text | {"accuracy": of_memory["accuracy"]} == of_memory
    assert "".join(part["text"] for part in of_text["runs"]) == TEXT
    assert json.loads(run("inspect", memories / "plain.nugget", "--json").stdout_bytes)["reconstructed"]
    renamed = tmp_path / "renamed.bin"
    renamed.write_bytes((memories / "exact.nugget").read_bytes())
    assert "⟦" in run("inspect", renamed).stdout


def test_inspect_writes_a_page_once(source: Path, memories: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("inspect", memories / "exact.nugget", "--html", page).stdout == ""
    assert page.read_text().startswith("<!DOCTYPE html>")
    fails("inspect", memories / "exact.nugget", "--html", page, saying="--force")
    run("inspect", memories / "exact.nugget", "--html", page, "--force")


def test_a_memory_takes_no_ratio(memories: Path) -> None:
    fails("inspect", memories / "plain.nugget", "--ratio", 4, saying="--ratio")


# ---- demo and train ----


def test_demo(model: str, source: Path) -> None:
    printed = run("demo", source, "--model", model).stdout
    assert "nuggets at 4" in printed and "nuggets at 10" in printed and "BLEU" in printed
    assert "identical to the original" in printed
    printed = run("demo", source, "--model", model, "--ratio", 7).stdout
    assert "nuggets at 7" in printed and "nuggets at 4" not in printed


def test_demo_brings_its_document(model: str) -> None:
    assert "lighthouse" in run("demo", "--model", model, "--ratio", 20).stdout


def test_demo_without_sacrebleu_names_the_remedy(model: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert "nugget2d[bench]" in run("demo", source, "--model", model, "--ratio", 7).stdout


def test_train_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = pytest.importorskip("nugget2d.training.run")
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "train", lambda recipe, *, out, fresh: calls.append((recipe, out, fresh)))
    run("train", "a.yaml")
    run("train", "a.yaml", "--out", tmp_path, "--fresh")
    assert calls == [(Path("a.yaml"), None, False), (Path("a.yaml"), tmp_path, True)]


# ---- bad input ----


@pytest.mark.parametrize(
    ("content", "saying"),
    [(None, "No such file"), (b"", "is empty"), (b"caf\xe9 au lait", "not UTF-8 (byte 3)")],
)
@pytest.mark.parametrize("command", ["compress", "inspect", "demo"])
def test_bad_text(command: str, content: bytes | None, saying: str, model: str, tmp_path: Path) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "a.nugget"
    if content is not None:
        path.write_bytes(content)
    target = ["-o", out] if command == "compress" else []
    fails(command, path, *target, "--model", model, saying=saying)
    assert not out.exists()


def test_bad_standard_input(model: str, tmp_path: Path) -> None:
    fails("compress", "-", "-o", tmp_path / "a", "--model", model, stdin=b"", saying="standard input is empty")
    fails("compress", "-", "-o", tmp_path / "a", "--model", model, stdin=b"\xff", saying="standard input is not UTF-8")
    fails("compress", tmp_path, "-o", tmp_path / "a", "--model", model, saying="directory")


def test_a_text_is_not_replaced_by_its_memory(source: Path, model: str, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(source.read_bytes())
    fails("compress", text, "-o", text, "--force", "--model", model, saying="is the text itself")
    assert text.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("ratio", ["0.5", "0", "-3"])
def test_ratio_below_one(ratio: str, model: str, source: Path, tmp_path: Path) -> None:
    fails("compress", source, "-o", tmp_path / "a", "--model", model, "--ratio", ratio, saying="at least 1")
    assert not list(tmp_path.iterdir())


def test_unknown_model(source: Path, memories: Path, tmp_path: Path) -> None:
    fails("compress", source, "-o", tmp_path / "a", "--model", "nonsense", saying="unknown model 'nonsense'")
    fails("reconstruct", memories / "plain.nugget", "--model", tmp_path, saying="nugget2d.json")


def test_the_model_named_in_a_memory_is_gone(source: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", name="lost")
    run("compress", source, "-o", tmp_path / "a.nugget", "--model", folder)
    fails(
        "reconstruct",
        tmp_path / "a.nugget",
        saying="made by 'lost': fetch it with --model lost, or say where it is with --model",
    )
    run("reconstruct", tmp_path / "a.nugget", "--model", folder)


@pytest.mark.parametrize("command", ["reconstruct", "inspect", "generate"])
def test_memory_of_another_model_names_both(command: str, model: str, memories: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1, name="other-model")
    prompt = ["--prompt", "a"] if command == "generate" else []
    fails(command, memories / "plain.nugget", *prompt, "--model", other, saying="'other-model'")
    fails(command, memories / "plain.nugget", *prompt, "--model", other, saying=f"'{model}'")


@pytest.mark.parametrize("command", ["reconstruct", "inspect"])
@pytest.mark.parametrize("content", [b"", b"short", b"just a text file, nothing else" * 9, b"\x00" * 99, b"\xff" * 99])
def test_not_a_memory(command: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.nugget"
    path.write_bytes(content)
    fails(command, path, saying="not a memory")


def test_missing_memory(tmp_path: Path) -> None:
    fails("reconstruct", tmp_path / "a.nugget", saying="No such file")
    fails("inspect", tmp_path / "a.nugget", saying="No such file")


def test_truncated_memory(memories: Path, tmp_path: Path) -> None:
    data = (memories / "exact.nugget").read_bytes()
    path = tmp_path / "a.nugget"
    for length in [3, 8, 9, 200, *range(1000, len(data), len(data) // 12), len(data) - 1]:
        path.write_bytes(data[:length])
        fails("reconstruct", path, saying=str(path))


@pytest.mark.slow
def test_every_flipped_bit_of_a_memory_is_found(memories: Path, tmp_path: Path) -> None:
    """All of the header, where a flip can turn into any other file, and samples of the tensors."""
    data = (memories / "exact.nugget").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "a.nugget"
    for offset in [*range(0, header, 3), *range(header, len(data), len(data) // 60), len(data) - 1]:
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << offset % 8]) + data[offset + 1 :])
        fails("reconstruct", path, saying=str(path))


# ---- output ----


def test_output_is_checked_before_any_work(
    source: Path, memories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("loaded a model although the output cannot be written")

    monkeypatch.setattr("nugget2d.Nugget2D.from_pretrained", unreachable)
    (tmp_path / "exists").write_text("precious")
    for out, saying in [
        (tmp_path / "exists", "--force"),
        (tmp_path, "folder"),
        (tmp_path / "no" / "a", "does not exist"),
        (tmp_path / ("long" * 99), "too long"),
        (Path(os.devnull), "folder or a device"),
    ]:
        fails("compress", source, "-o", out, saying=saying)
        fails("reconstruct", memories / "plain.nugget", "-o", out, saying=saying)
        fails("inspect", memories / "plain.nugget", "--html", out, saying=saying)
    assert (tmp_path / "exists").read_text() == "precious"


def test_closed_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    fails("compress", source, "-o", tmp_path / "a", saying="no permission")


def test_force_replaces(model: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.nugget"
    out.write_text("old")
    run("compress", source, "-o", out, "--model", model, "--force")
    Memory.load(out)


def test_no_space_left(
    model: str, source: Path, memories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    kept = tmp_path / "kept"
    kept.write_text("precious")
    fails("compress", source, "-o", kept, "--model", model, "--force", saying="No space left")
    fails("reconstruct", memories / "plain.nugget", "-o", tmp_path / "new", saying="No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "precious"


# ---- as a process ----


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_behind_a_redirection(memories: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*SCRIPT, "inspect", memories / "exact.nugget"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "error: cannot write standard output: No space left on device; free some space\n"


@pytest.mark.e2e
def test_a_process_writes_the_bytes_and_nothing_else(memories: Path) -> None:
    done = subprocess.run([*SCRIPT, "reconstruct", memories / "exact.nugget"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, TEXT.encode(), b"")


@pytest.mark.e2e
def test_a_closed_pipe_is_quiet(memories: Path) -> None:
    process = subprocess.Popen(
        [*SCRIPT, "generate", memories / "plain.nugget", "--prompt", "a"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


@pytest.mark.e2e
def test_interrupt_exits_with_130(memories: Path) -> None:
    process = subprocess.Popen(
        [*SCRIPT, "generate", memories / "plain.nugget", "--prompt", "a", "--max-new-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background jobs ignore SIGINT, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, b"error: interrupted\n")
