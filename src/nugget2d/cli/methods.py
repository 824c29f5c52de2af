"""`nugget2d methods`: lists the compression methods."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nugget2d.cli.shared import safe_to_interrupt

COLUMNS = ("name", "needs training", "payload", "query-agnostic", "options", "source")


def methods() -> None:
    """List the compression methods; `--method` takes their names."""
    with safe_to_interrupt():
        from nugget2d.methods.registry import METHODS, method_class

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for name in METHODS:
        kind = method_class(name)
        cells = (
            name,
            "yes" if kind.needs_training else "no",
            kind.payload,
            "yes" if kind.query_agnostic else "no",
            ", ".join(kind.model_fields),
            kind.source,
        )
        table.add_row(*map(Text, cells))
    Console().print(table)
