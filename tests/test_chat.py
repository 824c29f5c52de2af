"""`nugget2d chat`: a conversation over a pipe, its commands, and what can go wrong without ending it."""

import os
import pty
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tiny
from cli_fixtures import TEXT, save_tiny_model
from nugget2d import Memory, Nugget2D
from nugget2d.cli.app import app
from nugget2d.cli.chat import describe

SCRIPT = [sys.executable, "-c", "from nugget2d.cli.app import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def _restore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        yield


def chat(model: str, *arguments: object, stdin: str | bytes = "") -> Result:
    options = ["--model", model, "--recent-window", "20", "--ratio", "4", "--max-new-tokens", "6"]
    result = CliRunner().invoke(app, ["chat", *map(str, arguments), *options], input=stdin)
    assert result.exit_code == 0, result.output
    return result


def test_lines_are_continued_over_the_documents(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(tiny.TEXT)
    (tmp_path / "b.txt").write_bytes(TEXT.encode())
    result = chat(model, tmp_path / "a.txt", tmp_path / "b.txt", stdin="The lamp\n\nThe sea\n")
    stream = Nugget2D.from_pretrained(model).stream(20, 4)
    stream.append(tiny.TEXT + "\n" + TEXT + "\n")
    expected = ""
    for line in ("The lamp", "The sea"):
        expected += "".join(stream.generate(line, max_new_tokens=6)) + "\n"
        stream.append("\n")
    assert result.stdout_bytes.decode() == expected
    assert result.stderr == ""


def test_a_session_is_saved_forgotten_and_loaded(model: str, tmp_path: Path) -> None:
    out = tmp_path / "a.nugget"
    first = chat(model, stdin=f"The lamp\n/save {out}\n/save {out}\n/forget\n/load {out}\n/save {tmp_path}/b.nugget\n")
    saved, again = Memory.load(out), Memory.load(tmp_path / "b.nugget")
    assert saved.num_tokens > 6 and again.positions == saved.positions
    saying = first.stderr.splitlines()
    assert saying[0].startswith(f"saved: {out}: {saved.num_tokens} tokens as {saved.num_nuggets} nuggets, ")
    assert saying[1] == f"error: {out} exists; give another name"
    assert len(saying) == 3
    assert Nugget2D.from_pretrained(model).reconstruct(saved)


def test_inspect_help_and_quit(model: str) -> None:
    shown = chat(model, stdin="The lamp\n/inspect\n/help\n/quit\nThe sea\n").stdout
    assert "nuggets are between" in shown and "/forget" in shown and shown.rstrip().endswith("stops the answer.")


@pytest.mark.parametrize(
    ("line", "saying"),
    [
        (b"/what\n", "unknown command '/what'"),
        (b"/save\n", "/save needs a file name"),
        (b"/save /none/a.nugget\n", "folder /none does not exist"),
        (b"/load none.nugget\n", "cannot read memory none.nugget"),
        (b"/inspect\n", "nothing was read"),
        (b"caf\xe9\n", "the line is not UTF-8 (byte 3)"),
    ],
)
def test_errors_do_not_end_the_session(model: str, line: bytes, saying: str) -> None:
    result = chat(model, stdin=line + b"The lamp\n")
    assert result.stderr.startswith("error: ") and saying in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout_bytes == chat(model, stdin="The lamp\n").stdout_bytes


def test_special_tokens_and_long_lines_are_text(model: str) -> None:
    assert chat(model, stdin=f"{tiny.END}</s> {'The lamp burned. ' * 40}\n").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["none.txt"], "cannot read none.txt"),
        (["--recent-window", "0"], "recent_window must be"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_what_cannot_begin_ends_with_one_line(model: str, arguments: list[str], saying: str) -> None:
    result = CliRunner().invoke(app, ["chat", "--model", model, *arguments], input="")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and saying in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.e2e
def test_ctrl_c_stops_the_answer_not_the_program(model: str) -> None:
    process = subprocess.Popen(
        [*SCRIPT, "chat", "--model", model, "--recent-window", "20", "--max-new-tokens", "1000000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        # a shell's background jobs ignore SIGINT, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"The lamp\n")
    assert process.stdout.read(1)  # it is answering
    process.send_signal(signal.SIGINT)
    rest, printed = process.communicate(b"/what\n", timeout=120)
    assert rest.endswith(b"\n")
    assert (process.returncode, printed) == (0, b"error: unknown command '/what'; /help lists them\n")


@pytest.mark.e2e
def test_on_a_terminal_the_status_is_shown(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(tiny.TEXT)
    near, far = pty.openpty()
    command = [*SCRIPT, "chat", str(tmp_path / "a.txt"), "--model", model, "--recent-window", "20", "--ratio", "4"]
    process = subprocess.Popen(command, stdin=far, stdout=far, stderr=far)
    os.close(far)
    shown = b""
    while b"> " not in shown:
        shown += os.read(near, 1000)
    os.write(near, b"/quit\n")
    assert process.wait(timeout=120) == 0
    os.close(near)
    shown = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown)  # colours, cursor
    assert re.search(rb"\d+ tokens read, \d+ nuggets and \d+ uncompressed tokens held, [\d,]+ bytes, ratio \d", shown)


def test_the_status_says_what_is_held() -> None:
    stream = tiny.trained("llama", "copies").stream(20, 4)
    stream.append(tiny.random_ids(1, 20 + 2 * tiny.WINDOW + 1)[0])
    held = f"85 tokens read, 16 nuggets and 21 uncompressed tokens held, {stream.nbytes:,} bytes, ratio 2.3"
    assert describe(stream) == held
