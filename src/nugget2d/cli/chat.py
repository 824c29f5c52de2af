"""`nugget2d chat`: interactive continuation over documents of any length, in bounded memory."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from nugget2d.cli.options import DEFAULT_MODEL, ModelName, Seed, Temperature, finite
from nugget2d.cli.shared import (
    load_memory,
    load_model,
    one_line,
    readable_stdin,
    require_temperature,
    say,
    waiting,
    write_stdout,
)
from nugget2d.errors import InputError, NuggetError, OutputError
from nugget2d.files import check_writable, decode_text, read_text

if TYPE_CHECKING:
    from nugget2d import Memory, Nugget2D
    from nugget2d.streaming.stream import Stream

PART = 2000  # characters of a document read between two updates of the status

HELP = """\
/save FILE   write a memory of all that was read
/load FILE   start over from a memory
/forget      forget everything
/inspect     show the memory: the text as the model reconstructs it, nuggets highlighted
/help        this
/quit        leave, as Ctrl-D does
Any other line is read and continued. Ctrl-C stops the answer."""


def chat(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE...]", help="UTF-8 texts to read first.", show_default=False)
    ] = None,
    recent_window: Annotated[int, typer.Option("--recent-window", help="Uncompressed recent tokens, at least.")] = 128,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio", callback=finite, help="Tokens for each nugget.", show_default="the model's threshold, or 10"
        ),
    ] = None,
    max_nuggets: Annotated[
        int | None, typer.Option("--max-nuggets", help="Nuggets held at most.", show_default="no limit")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 64,
    temperature: Temperature = 0,
    seed: Seed = 0,
    model: ModelName = DEFAULT_MODEL,
) -> None:
    """Read documents, then lines from standard input, and continue each line; /help lists the commands."""
    require_temperature(temperature)
    texts = [(file, read_text(file)) for file in files or ()]
    reader = load_model(model)
    import torch

    torch.manual_seed(seed)
    session = _Session(reader, lambda memory: reader.stream(recent_window, ratio, max_nuggets, memory=memory))
    for name, text in texts:
        session.read(name, text)
    for line in _lines(session.show_status):
        try:
            if not session.obey(line):
                break
            if not line.startswith("/") and line:
                session.answer(line, max_new_tokens, temperature)
        except NuggetError as error:  # the session continues
            say("error", str(error))


class _Session:
    """A stream and the commands on it."""

    def __init__(self, model: "Nugget2D", start: "Callable[[Memory | None], Stream]") -> None:
        self._model, self._start = model, start
        self._stream = start(None)
        self._console = Console(stderr=True)

    def read(self, name: str, text: str) -> None:
        """Read a document, with a live status on a terminal."""
        with waiting(self._console, name) as status:
            for place in range(0, len(text), PART):
                self._stream.append(text[place : place + PART])
                status.update(Text(one_line(f"{name}: {describe(self._stream)}")))
        self._stream.append("\n")

    def answer(self, line: str, max_new_tokens: int, temperature: float) -> None:
        """Continue `line` on standard output."""
        with _interrupts() as interrupted:
            for part in self._stream.generate(line, max_new_tokens=max_new_tokens, temperature=temperature):
                write_stdout(part.encode())
                if interrupted():
                    break
        write_stdout(b"\n")
        self._stream.append("\n")

    def obey(self, line: str) -> bool:
        """Run a line that begins with /; False to leave."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/save":
            self._save(Path(_file(command, argument)))
        elif command == "/load":
            self._stream = self._start(load_memory(Path(_file(command, argument))))
        elif command == "/forget":
            self._stream = self._start(None)
        elif command == "/inspect":
            from nugget2d.inspection import inspect_memory, print_inspection

            print_inspection(inspect_memory(self._model, self._stream.memory()), Console())
        elif command == "/help":
            write_stdout(HELP.encode() + b"\n")
        elif command.startswith("/") and command != "/quit":
            raise InputError(f"unknown command {command!r}; /help lists them")
        return command != "/quit"

    def show_status(self) -> None:
        """One dim line on standard error, if it is a terminal."""
        if self._console.is_terminal:
            self._console.print(Text(describe(self._stream), "dim"), soft_wrap=True)

    def _save(self, path: Path) -> None:
        if path.exists():
            raise OutputError(f"{path} exists; give another name")
        check_writable(path, force=False)
        memory = self._stream.memory()
        size = memory.save(path, force=False)
        say("saved", f"{path}: {memory.num_tokens:,} tokens as {memory.num_nuggets:,} nuggets, {size:,} bytes")


def describe(stream: "Stream") -> str:
    """Tokens read, and what is held of them."""
    held = stream.num_nuggets + stream.num_uncompressed
    return (
        f"{stream.num_tokens:,} tokens read, {stream.num_nuggets:,} nuggets and {stream.num_uncompressed:,} "
        f"uncompressed tokens held, {stream.nbytes:,} bytes, ratio {stream.num_tokens / max(held, 1):.1f}"
    )


def _file(command: str, argument: str) -> str:
    if not argument:
        raise InputError(f"{command} needs a file name")
    return argument


def _lines(before_prompt: Callable[[], None]) -> Iterator[str]:
    """Lines of standard input, asked for on a terminal; those that are not UTF-8 are reported and left out."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            if terminal:
                before_prompt()
                data = (input("> ") + "\n").encode()
            else:
                with readable_stdin():
                    data = sys.stdin.buffer.readline()
        except EOFError:
            write_stdout(b"\n")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            write_stdout(b"\n")  # the line is dropped, the session goes on
            continue
        except UnicodeError as error:
            say("error", str(error))
            continue
        if not data:
            return
        try:
            line = decode_text(data, "the line").strip()
        except InputError as error:
            say("error", str(error))
        else:
            yield line


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Defer Ctrl-C within the block, so that tokens are read completely; yields a test whether it was pressed."""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a shell's background job
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
