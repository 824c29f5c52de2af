"""Every command behind terminals, pipes and folders of all kinds: no traceback, whatever the caller's are like."""

import json
import os
import pty
import pwd
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

import tiny
from cli_fixtures import TEXT, save_tiny_model
from nugget2d import Memory, Nugget2D
from nugget2d.checkpoints.gguf import converted
from nugget2d.cli.app import main
from nugget2d.errors import OutputError
from nugget2d.store import MemoryStore

ODD = os.fsdecode(b"caf\xe9 \x1b[31m\n\xc3\xa9.txt")  # Latin-1, an escape sequence, a newline, UTF-8
STREAMS = ("stdin", "stdout", "stderr")


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    stdout: bytes
    stderr: bytes


class Place(NamedTuple):
    """A model, a text, its memory, a store, and a folder for results."""

    model: Path
    text: Path
    memory: Path
    store: Path
    out: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("made")
    place = Place(*(folder / name for name in ("model", ODD, "m.nugget", "store", "out")))
    model = Nugget2D.from_pretrained(save_tiny_model(place.model))
    place.text.write_text(TEXT, newline="")
    model.compress(TEXT, ratio=4).save(place.memory)
    with MemoryStore(place.store) as store:
        for number in range(2):
            store.add(model, f"{number}. {tiny.TEXT}", name=f"{number} ⟦日本⟧ é", tags=[ODD])
    return place


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    """With a store and a folder of its own."""
    shutil.copytree(made.store, tmp_path / "store")
    return made._replace(store=tmp_path / "store", out=tmp_path)


Command = Callable[[Place], list[object]]
# every command with what it prints; others wait for clients, or measure for minutes
COMMANDS: dict[str, Command] = {
    "help": lambda at: ["--help"],
    "help of a command": lambda at: ["store", "add", "--help"],
    "wrong usage": lambda at: ["compress", "--", "--⟦"],
    "compress": lambda at: ["compress", at.text, "-o", at.out / "a.nugget", "--model", at.model],
    "compress -": lambda at: ["compress", "-", "-o", at.out / "a.nugget", "--model", at.model],
    "methods": lambda at: ["methods"],
    "reconstruct": lambda at: ["reconstruct", at.memory],
    "generate": lambda at: ["generate", at.memory, "--prompt", "a", "--max-new-tokens", 4],
    "chat": lambda at: ["chat", at.text, "--model", at.model, "--max-new-tokens", 4],
    "inspect": lambda at: ["inspect", at.memory],
    "inspect text": lambda at: ["inspect", at.text, "--model", at.model],
    "inspect --json": lambda at: ["inspect", at.text, "--json", "--model", at.model],
    "inspect --html": lambda at: ["inspect", at.text, "--html", at.out / "a.html", "--model", at.model],
    "demo": lambda at: ["demo", at.text, "--ratio", 4, "--model", at.model],
    "doctor": lambda at: ["doctor", at.model],
    "store add": lambda at: ["store", "add", at.text, "--tag", ODD, "--store", at.store, "--model", at.model],
    "store list": lambda at: ["store", "list", "--store", at.store],
    "store list --json": lambda at: ["store", "list", "--json", "--tag", ODD, "--store", at.store],
    "store show": lambda at: ["store", "show", MemoryStore(at.store).records()[0].id, "--store", at.store],
    "store search": lambda at: ["store", "search", "the lighthouse", "--store", at.store, "--model", at.model],
    "store rm": lambda at: ["store", "rm", MemoryStore(at.store).records()[0].id, "--store", at.store],
    "store verify": lambda at: ["store", "verify", "--store", at.store],
    "store gc": lambda at: ["store", "gc", "--store", at.store],
    "index of nothing": lambda at: ["index", at.out / ODD, "--store", at.store],
    "train": lambda at: ["train", at.out / ODD],
    "serve": lambda at: ["serve", "--host", "⟦ 0.0.0.0"],
    "bench distortion": lambda at: ["bench", "distortion", "-o", at.out / "b", "--ratios", ODD],
    "bench lm": lambda at: ["bench", "lm", "-o", at.out / "b", "--data", at.out / f"{ODD}:a=b"],
    "bench breakeven": lambda at: ["bench", "breakeven", "-o", at.out / "b", "--lengths", ODD],
}
NO_COMMAND = ("help", "help of a command", "wrong usage")
pytestmark = pytest.mark.e2e  # each test starts processes, most of them by a fork
every_command = pytest.mark.parametrize("command", COMMANDS)


def ended(
    arguments: list[object],
    folder: Path,
    *,
    closed: str = "",
    encoding: str = "utf-8",
    stdout: int | None = None,
    before: Callable[[], object] = lambda: None,
) -> Ended:
    """Run a command in a fork of this process, where torch is imported already, with streams as Python makes them."""
    files = [(folder / f".{name}").open("w+b") for name in STREAMS]
    child = os.fork()
    if not child:
        code = 70
        try:
            for number, (name, file) in enumerate(zip(STREAMS, files, strict=True)):
                os.dup2(stdout if name == "stdout" and stdout is not None else file.fileno(), number)
                mode = "w" if number else "r"
                setattr(
                    sys, name, None if name == closed else os.fdopen(number, mode, encoding=encoding, closefd=False)
                )
            if closed:
                os.close(STREAMS.index(closed))
            sys.argv = ["nugget2d", *map(str, arguments)]
            before()
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # as at exit
        except BaseException:
            os.write(files[2].fileno(), traceback.format_exc().encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    printed = []
    for file in files:
        file.seek(0)
        printed.append(file.read())
        file.close()
    return Ended(os.waitstatus_to_exitcode(status), *printed[1:])


def is_one_line(message: bytes) -> bool:
    return message.startswith(b"error: ") and message.count(b"\n") == 1 and b"\x1b" not in message


@every_command
@pytest.mark.parametrize("stream", STREAMS)
def test_a_closed_stream(command: str, stream: str, place: Place, tmp_path: Path) -> None:
    """As `<&-`, `>&-` and `2>&-` leave it."""
    done = ended(COMMANDS[command](place), tmp_path, closed=stream)
    assert done.code in (0, 1, 2) and b"Traceback" not in done.stderr, done.stderr.decode()
    if stream == "stdout" and done.code == 1:
        assert is_one_line(done.stderr.splitlines(keepends=True)[-1])
    if stream == "stdin" and command == "compress -":
        assert done.stderr == b"error: cannot read standard input: Bad file descriptor\n"


@every_command
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
def test_an_encoding(command: str, encoding: str, place: Place, tmp_path: Path) -> None:
    done = ended(COMMANDS[command](place), tmp_path, encoding=encoding)
    assert done.code in (0, 1, 2) and b"Traceback" not in done.stderr, done.stderr.decode()


@every_command
def test_a_reader_that_has_gone(command: str, place: Place, tmp_path: Path) -> None:
    """As in `nugget2d ... | true`."""
    reads, writes = os.pipe()
    os.close(reads)
    done = ended(COMMANDS[command](place), tmp_path, stdout=writes)
    os.close(writes)
    assert done.code in (0, 1, 2) and b"Traceback" not in done.stderr and b"Broken" not in done.stderr


@every_command
def test_a_full_disk(command: str, place: Place, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = ended(COMMANDS[command](place), tmp_path, stdout=full.fileno())
    assert done.code in (0, 1, 2) and b"Traceback" not in done.stderr, done.stderr.decode()


@every_command
def test_a_working_folder_that_was_removed(command: str, place: Place, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    def leave() -> None:
        os.chdir(gone)
        gone.rmdir()

    done = ended(COMMANDS[command](place), tmp_path, before=leave)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    if command not in NO_COMMAND:
        assert (
            done.stderr == b"error: cannot use the working folder: No such file or directory; change to another one\n"
        )


@every_command
def test_no_home_folder(command: str, place: Place, tmp_path: Path) -> None:
    """Neither $HOME nor an entry of this user, as in some containers."""

    def leave() -> None:
        for name in ("HOME", "NUGGET2D_CACHE", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)

        def getpwuid(number: int) -> NoReturn:
            raise KeyError(number)

        pwd.getpwuid = getpwuid

    arguments = [argument for argument in COMMANDS[command](place) if argument not in ("--store", place.store)]
    done = ended(arguments, tmp_path, before=leave)
    assert done.code in (0, 1, 2) and b"Traceback" not in done.stderr, done.stderr.decode()
    if command.startswith("store "):
        saying = b"error: there is no home folder for ~/.nugget2d/store; set HOME, or give a whole path\n"
        assert done.stderr == saying or command in NO_COMMAND


def test_a_gguf_without_home_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NUGGET2D_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", _no_home)
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(OutputError, match="set NUGGET2D_CACHE to a folder"):
        converted(tmp_path / "a.gguf")


def _no_home(path: Path) -> NoReturn:
    raise RuntimeError("Could not determine home directory.")


# ---- what is printed ----


def test_what_an_encoding_cannot_show_is_escaped(place: Place, tmp_path: Path) -> None:
    names = {"utf-8": "0 ⟦日本⟧ é", "cp1252": r"0 \u27e6\u65e5\u672c\u27e7 é"}
    for encoding, name in names.items():
        shown = ended(COMMANDS["store list"](place), tmp_path, encoding=encoding).stdout.decode(encoding)
        assert name in shown and r"caf\xe9 " in shown
    shown = ended(COMMANDS["inspect"](place), tmp_path, encoding="ascii").stdout.decode("ascii")
    assert r"nuggets are between \u27e6 and \u27e7" in shown
    listed = ended(COMMANDS["store list --json"](place), tmp_path, encoding="ascii").stdout
    assert [record["name"] for record in json.loads(listed)] == ["0 ⟦日本⟧ é", "1 ⟦日本⟧ é"]


def test_messages_command_no_terminal(tmp_path: Path) -> None:
    """A file's name is in its message, on one line and without the escape sequence that it holds."""
    done = ended(["compress", tmp_path / ODD, "-o", tmp_path / "a"], tmp_path)
    assert is_one_line(done.stderr) and "caf\\xe9 \u241b[31m é.txt" in done.stderr.decode()


def test_a_terminal_of_few_characters(place: Place, tmp_path: Path) -> None:
    """Spinner and bars, on a terminal whose encoding has no other characters than ASCII."""
    near, far = pty.openpty()
    command = [sys.executable, "-m", "nugget2d", *map(str, COMMANDS["compress"](place))]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, env=environment)
    os.close(far)
    shown = b""
    with suppress(OSError):  # at its end
        while part := os.read(near, 4096):
            shown += part
    os.close(near)
    assert process.wait(timeout=60) == 0 and b"loading model" in shown
    assert shown.isascii() and b"\\u" not in shown


@pytest.mark.parametrize(
    ("redirection", "code", "saying"),
    [
        ("<&-", 1, "error: cannot read standard input: Bad file descriptor\n"),
        (">&-", 1, "error: cannot write standard output: Bad file descriptor\n"),
        ("2>&-", 0, ""),
    ],
)
def test_a_closed_stream_of_a_process(redirection: str, code: int, saying: str, place: Place, tmp_path: Path) -> None:
    """As Python starts with it; the file that is written gets no number that a library prints to."""
    command = [sys.executable, "-m", "nugget2d", *map(str, COMMANDS["compress -"](place))]
    shell = ["sh", "-c", f'"$@" {redirection}', "sh", *command]
    done = subprocess.run(shell, input=TEXT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, saying)
    if redirection != "<&-":
        assert Memory.load(place.out / "a.nugget").num_chars == len(TEXT)
