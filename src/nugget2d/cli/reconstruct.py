"""`nugget2d reconstruct`: reconstructs the text of a memory."""

from pathlib import Path
from typing import Annotated

import typer

from nugget2d.cli.options import Force, MemoryFile, ReaderName, to_write
from nugget2d.cli.shared import load_memory, load_reader, progress, write_stdout
from nugget2d.files import atomic_write, check_writable


def reconstruct(
    file: MemoryFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", callback=to_write, help="Where to write the text.", show_default="standard output"),
    ] = None,
    model: ReaderName = None,
    force: Force = False,
) -> None:
    """Reconstruct the text of a memory; the identical bytes if it was made with --exact."""
    if out is not None:
        check_writable(out, force=force)
    memory = load_memory(file)
    reader = load_reader(memory, model)
    with progress("reconstructing") as on_progress:
        data = reader.reconstruct(memory, on_progress=on_progress).encode()
    if out is None:
        write_stdout(data)
        return
    with atomic_write(out, force=force) as target:
        target.write(data)
