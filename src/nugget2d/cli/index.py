"""`nugget2d index`: compresses a corpus into a store."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nugget2d.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_STORE,
    Engine,
    ModelName,
    StorePlace,
    Tags,
    takes_compress_options,
)
from nugget2d.cli.shared import metrics_table, progress, safe_to_interrupt, say

if TYPE_CHECKING:
    from nugget2d.indexing.run import Summary


@takes_compress_options
def index(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER|JSONL", help="A folder of .txt and .md files, a .jsonl or .jsonl.xz file.")
    ],
    store: StorePlace = DEFAULT_STORE,
    engine: Annotated[
        Engine, typer.Option("--engine", help="Processes of this machine, or actors of a Ray cluster.")
    ] = "process",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes, one thread each.", show_default="one a core")
    ] = None,
    tag: Tags = None,
    *,
    options: dict[str, Any],
    model: ModelName = DEFAULT_MODEL,
) -> None:
    """Compress every document of a corpus into a store; documents that it has already are skipped.

    The same command resumes an interrupted run. Documents that cannot be read are named at the end.
    """
    with safe_to_interrupt():
        from nugget2d.indexing.run import index as run
        from nugget2d.indexing.work import Job

    job = Job(store=store, model=model, options=options, tags=tuple(tag or ()))
    with progress("indexing", unit="documents") as on_progress:
        summary = run(source, job, workers or os.cpu_count() or 1, on_progress, engine)
    for failure in summary.failures:
        say("error", f"{failure.name}: {failure.reason}")
    Console().print(_report(summary))
    if summary.failures:
        raise typer.Exit(1)


def _report(summary: "Summary") -> Table:
    table = metrics_table()
    table.add_row("documents", f"{summary.documents:,}")
    table.add_row("added", f"{summary.added:,}")
    table.add_row("in the store before", f"{summary.known:,}")
    table.add_row("failed", f"{len(summary.failures):,}")
    table.add_row("tokens compressed", f"{summary.tokens:,}")
    table.add_row("seconds", f"{summary.seconds:.2f}")
    table.add_row("documents a second", f"{summary.added / summary.seconds:,.2f}")
    table.add_row("tokens a second", f"{summary.tokens / summary.seconds:,.0f}")
    return table
