"""The published pages show what the benchmarks wrote."""

from pathlib import Path

import pytest

import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_pages_show_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table reconstruction -->" in text
    assert tables.filled(text) == text, "run `python benchmarks/tables.py`"


def test_what_stands_in_a_table_is_replaced() -> None:
    made = f"before\n<!-- table speed -->\n{tables.speed()}\n<!-- end -->\nafter"
    for old in ("old | figures\n", ""):
        text = f"before\n<!-- table speed -->\n{old}<!-- end -->\nafter"
        assert tables.filled(text + text) == made + made
