"""`nugget2d compress`: compresses a text into a memory file."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nugget2d.cli.options import (
    DEFAULT_MODEL,
    Force,
    ModelName,
    takes_compress_options,
    to_write,
)
from nugget2d.cli.shared import against, load_model, metrics_table, progress, read_source
from nugget2d.errors import InputError
from nugget2d.files import check_writable

if TYPE_CHECKING:
    from nugget2d import Memory


@takes_compress_options
def compress(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A UTF-8 text; - reads standard input.")],
    out: Annotated[Path, typer.Option("--out", "-o", callback=to_write, help="Where to write the memory.")],
    *,
    options: dict[str, Any],
    model: ModelName = DEFAULT_MODEL,
    force: Force = False,
) -> None:
    """Compress a text into a memory file."""
    check_writable(out, force=force)
    text = read_source(file)
    if file != "-" and out.exists() and out.samefile(file):
        raise InputError(f"{out} is the text itself; give the memory another name")
    compressor = load_model(model)
    from nugget2d.methods.options import CompressOptions

    how = CompressOptions.to_keep(compressor, **options)
    start = perf_counter()
    with progress("compressing") as on_progress:
        (memory,) = how.compress(compressor, [text], on_progress)
    seconds = perf_counter() - start
    size = memory.save(out, force=force)
    Console().print(_report(memory, size, seconds))


def _report(memory: "Memory", size: int, seconds: float) -> Table:
    table = metrics_table()
    table.add_row("tokens", f"{memory.num_tokens:,}")
    table.add_row("nuggets", f"{memory.num_nuggets:,}")
    table.add_row("ratio", f"{memory.ratio:.2f}")
    if memory.accuracy is not None:
        ratios = [segment.num_tokens / segment.num_nuggets for segment in memory.segments]
        table.add_row("lowest and highest segment ratio", f"{min(ratios):.2f}, {max(ratios):.2f}")
        table.add_row("measured accuracy", f"{memory.accuracy:.4f}")
    table.add_row("memory against full KV cache", against(memory.nbytes, memory.full_nbytes))
    if memory.exact is not None:
        table.add_row("patch for exact text", f"{memory.exact.patch_nbytes:,} bytes")
        table.add_row("lossless copy", f"{memory.exact.copy_nbytes:,} bytes")
    table.add_row("file", f"{size:,} bytes")
    table.add_row("seconds", f"{seconds:.2f}")
    return table
