"""`nugget2d inspect`: shows which tokens became nuggets, with their scores."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nugget2d.cli.options import DEFAULT_MODEL, Force, ReaderName, Selection, SelectionOption, finite, to_write
from nugget2d.cli.shared import load_memory, load_model, load_reader, progress, read_source, say, write_stdout
from nugget2d.errors import InputError
from nugget2d.files import atomic_write, check_writable

if TYPE_CHECKING:
    from nugget2d.inspection import Inspection


def inspect(
    file: Annotated[str, typer.Argument(metavar="MEMORY.nugget|FILE|-", help="A memory, or a UTF-8 text to compress.")],
    html: Annotated[
        Path | None, typer.Option("--html", callback=to_write, help="Write a self-contained HTML page.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of colours.")] = False,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", callback=finite, help="Tokens for each nugget (texts only).", show_default="20"),
    ] = None,
    model: ReaderName = None,
    selection: SelectionOption = None,
    force: Force = False,
) -> None:
    """Show a text with its nuggets highlighted.

    A memory does not hold its text: unless it was made with --exact, what is shown is what the model reconstructs.
    """
    if html is not None:
        check_writable(html, force=force)
    if _is_memory(file):
        if ratio is not None or selection is not None:
            raise InputError(f"--ratio and --selection are for texts, but {file} is a memory; leave them out")
        inspection = _inspect_memory(Path(file), model)
    else:
        inspection = _inspect_text(file, ratio, model, selection)
    if html is not None:
        from nugget2d.inspection import to_html

        with atomic_write(html, force=force) as page:
            page.write(to_html(inspection).encode())
        say("wrote", str(html))
    if json:
        from nugget2d.inspection import to_json

        write_stdout(to_json(inspection).encode())
    elif html is None:
        from nugget2d.inspection import print_inspection

        print_inspection(inspection, Console())


def _is_memory(source: str) -> bool:
    """By name, so that a damaged memory is not taken for a text; else by the first bytes of a safetensors file."""
    path = Path(source)
    if path.suffix == ".nugget":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False  # "-", or an error that reading it as a text will report
    # a header of less than 16 MB, opened by a brace: no text has NULs there
    return start[4:] == b"\0\0\0\0{"


def _inspect_memory(path: Path, model: str | None) -> "Inspection":
    memory = load_memory(path)
    reader = load_reader(memory, model)
    from nugget2d.inspection import inspect_memory

    with progress("reconstructing") as on_progress:
        return inspect_memory(reader, memory, on_progress)


def _inspect_text(source: str, ratio: float | None, model: str | None, selection: Selection | None) -> "Inspection":
    text = read_source(source)
    compressor = load_model(model or DEFAULT_MODEL)
    from nugget2d.inspection import inspect_text
    from nugget2d.methods.options import CompressOptions

    how = CompressOptions.to_keep(compressor, ratio=ratio, selection=selection)
    with progress("compressing") as on_progress:
        (memory,) = how.compress(compressor, [text], on_progress)
    return inspect_text(compressor, text, memory)
