"""`nugget2d doctor`: checks this machine and a model."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nugget2d.cli.options import DEFAULT_MODEL
from nugget2d.cli.shared import loading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nugget2d.inspection.doctor import Finding, Report, Size

TOKENS = (1_000, 10_000, 100_000)


def doctor(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Bundled model, folder, hub id or .gguf file.")
    ] = DEFAULT_MODEL,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="A length of context to size.", show_default="1000, 10000 and 100000"),
    ] = None,
) -> None:
    """Check this machine and a model: what works, what is missing, how much memory contexts take.

    Exits with 1 if the model cannot be used.
    """
    with loading(model):
        from nugget2d.inspection.doctor import examine

        report = examine(model, TOKENS if tokens is None else (tokens,))
    _print(report, Console())
    if not report.usable:
        raise typer.Exit(1)


def _print(report: "Report", console: Console) -> None:
    for title, findings in (("machine", report.machine), ("model", report.model)):
        console.print(_findings(title, findings))
    if report.sizes:
        console.print(_sizes(report.sizes))


def _findings(title: str, findings: "Sequence[Finding]") -> Table:
    table = Table(title=title, show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        style = "bold red" if finding.fatal else "" if finding.remedy is None else "yellow"
        table.add_row(finding.name, Text(finding.value, style), Text(finding.remedy or ""))
    return table


def _sizes(sizes: "Sequence[Size]") -> Table:
    table = Table(title="bytes of a context", box=None, padding=(0, 2, 0, 0), title_justify="left", header_style="dim")
    for column in ("tokens", "full", *(f"{ratio}x {dtype}" for ratio, dtype in sizes[0].nuggets)):
        table.add_column(column, justify="right", no_wrap=True)
    for size in sizes:
        table.add_row(*(f"{number:,}" for number in (size.tokens, size.full, *size.nuggets.values())))
    return table
