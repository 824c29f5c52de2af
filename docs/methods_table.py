"""Fills the table of methods in README.md from the registry: `python docs/methods_table.py`."""

import re
from pathlib import Path

from nugget2d.methods.registry import METHODS, method_class

README = Path(__file__).parent.parent / "README.md"
COLUMNS = ("method", "needs training", "payload", "query-agnostic", "options", "source")


def table() -> str:
    """The table, one row a method."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name in METHODS:
        kind = method_class(name)
        options = ", ".join(f"`{option}`" for option in kind.model_fields)
        trained, agnostic = ("yes" if flag else "no" for flag in (kind.needs_training, kind.query_agnostic))
        lines.append(f"| `{name}` | {trained} | {kind.payload} | {agnostic} | {options} | {kind.source} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """`page` with the table as it should be."""
    return re.sub(
        r"(<!-- table methods -->\n).*?(\n<!-- end -->)",
        lambda match: match[1] + table() + match[2],
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
