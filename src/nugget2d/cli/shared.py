"""Helpers of all commands: one-line messages, progress, loading models, bytes to standard output."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from nugget2d.errors import (
    AccuracyWarning,
    ContextWarning,
    DamageWarning,
    ExactFallbackWarning,
    InputError,
    ModelError,
    SearchWarning,
)
from nugget2d.files import decode_text, read_text
from nugget2d.text.visible import escaped, visible

if TYPE_CHECKING:
    from nugget2d import Memory, Nugget2D

INTERRUPTED = 130  # the exit code of shells for a process ended by SIGINT
SPEED_SECONDS = 600  # remaining time comes from steps this recent; a step of a benchmark takes minutes


def say(kind: str, message: str) -> None:
    """Print `kind: message` as exactly one line on standard error, whatever newlines and controls the message holds."""
    style = {"error": "bold red", "warning": "bold yellow"}.get(kind, "bold")
    line = Text.assemble((f"{kind}:", style), " ", one_line(message))
    Console(stderr=True).print(line, soft_wrap=True)


def one_line(text: str) -> str:
    """Any text, also a file name of any bytes, as one line without control characters."""
    return " ".join(visible(escaped(text), marked=False).split())


def waiting(console: Console, text: str) -> Status:
    """A line with a spinner, in ASCII where the terminal has nothing else, shown while something takes long."""
    return console.status(Text(one_line(text)), spinner="line" if console.options.ascii_only else "dots")


def load_model(name: str, *, local_files_only: bool = False) -> "Nugget2D":
    """Load a model onto the GPU if there is one, without messages of other libraries.

    Args:
        name: which.
        local_files_only: as `Nugget2D.from_pretrained`.

    Raises:
        ModelError: there is no such model, or its files are incomplete.
    """
    with loading(name):
        import torch

        from nugget2d import Nugget2D

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Nugget2D.from_pretrained(name, device=device, local_files_only=local_files_only)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Import torch, silence other libraries, and show on the terminal that `name` is being loaded."""
    show_own_warnings()
    with waiting(Console(stderr=True), f"loading model {name}"):
        with safe_to_interrupt():
            from transformers.utils import logging

            from nugget2d import Nugget2D  # noqa: F401 - with torch

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


def load_reader(memory: "Memory", name: str | None) -> "Nugget2D":
    """The model that reads `memory`: `name`, or else the one that the memory names, if it is on this machine.

    A memory may come from anybody, so what it names is not fetched unasked.

    Raises:
        ModelError: it cannot be loaded.
        MismatchError: it is not the model that made the memory.
    """
    made_by = memory.fingerprint.name
    try:
        model = load_model(name or made_by, local_files_only=name is None)
    except ModelError as error:
        if name is not None:
            raise
        from nugget2d.checkpoints.resolve import is_hub_id

        fetch = f"fetch it with --model {made_by}, or " if is_hub_id(made_by) else ""
        raise ModelError(f"{error}; the memory was made by {made_by!r}: {fetch}say where it is with --model") from error
    model.require(memory)
    return model


def load_memory(path: Path) -> "Memory":
    """Read a memory file.

    Raises:
        MemoryFileError: missing, not a memory, truncated or damaged.
    """
    with safe_to_interrupt():
        from nugget2d import Memory

    return Memory.load(path)


def read_source(source: str) -> str:
    """The text of a file, or of standard input for "-".

    Raises:
        InputError: missing, closed, empty or not UTF-8.
    """
    if source != "-":
        return read_text(source)
    with readable_stdin():
        return decode_text(sys.stdin.buffer.read(), "standard input")


@contextmanager
def readable_stdin() -> Iterator[None]:
    """Within the block standard input is read.

    Raises:
        InputError: it is closed, or a folder.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read standard input: {error.strerror}") from error


def bundled_text() -> str:
    """The article that comes with the package."""
    return (resources.files("nugget2d") / "cli" / "demo.txt").read_text(encoding="utf-8")


@contextmanager
def progress(label: str, unit: str = "segments") -> Iterator[Callable[[int, int], None]]:
    """A bar over units on standard error, drawn only on a terminal; yields a function for `on_progress`."""
    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=SPEED_SECONDS
    ) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_stdout(data: bytes) -> None:
    """Write bytes to standard output as they are: no newline added, none translated."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def metrics_table() -> Table:
    """An empty table for names and right-aligned values."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    return table


def against(part: int, whole: int) -> str:
    """`part` bytes as a share of `whole`."""
    return f"{part:,} of {whole:,} bytes ({part / whole:.1%})"


def require_temperature(temperature: float) -> None:
    """Refuse temperatures that cannot scale logits.

    Raises:
        InputError: negative.
    """
    if temperature < 0:
        raise InputError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")


@contextmanager
def safe_to_interrupt() -> Iterator[None]:
    """While torch is imported, Ctrl-C ends the process at once: an exception inside its C++ start-up would abort it."""

    def leave(*_: object) -> None:
        Console(stderr=True).show_cursor()
        say("error", "interrupted")
        os._exit(INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a shell's background job
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show_own_warnings() -> None:
    """Python warnings: ours as one line, none of other libraries."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say("warning", str(message))

    warnings.simplefilter("ignore")
    for ours in (ExactFallbackWarning, ContextWarning, AccuracyWarning, SearchWarning, DamageWarning):
        warnings.simplefilter("always", ours)
    warnings.showwarning = show
