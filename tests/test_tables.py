"""The published pages show what the benchmarks wrote."""

from pathlib import Path

import pytest

import again
import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_pages_show_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table reconstruction -->" in text
    assert tables.filled(text) == text, "run `python benchmarks/tables.py`"


def test_what_stands_in_a_table_is_replaced() -> None:
    made = f"before\n<!-- table speed -->\n{tables.speed()}\n<!-- end -->\nafter"
    for old in ("old | numbers\n", ""):
        text = f"before\n<!-- table speed -->\n{old}<!-- end -->\nafter"
        assert tables.filled(text + text) == made + made


def test_every_figure_can_be_made_again() -> None:
    found = again.commands(again.PAGE.read_text(encoding="utf-8"))
    assert len(found) > 12
    for path, command in found.items():
        assert command.startswith(("nugget2d ", "python ", "for ", "D=")), command
        assert (tables.ROOT / path.replace("$policy", "window")).exists()


def test_commands_of_a_page_run_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, log = tmp_path / "PAGE.md", tmp_path / "log"
    blocks = [
        f"    N=one\n    echo $N \\\n        >> {log}  # -o benchmarks/results/one\n",
        f"    exit 3; echo never >> {log} --out benchmarks/results/two\n",
        f"    echo three >> {log} -o benchmarks/results/three\n",
        f"    echo four >> {log} --out elsewhere\n",
    ]
    page.write_text("text\n\n" + "\ntext\n\n".join(blocks))
    monkeypatch.setattr(again, "PAGE", page)
    filled: list[bool] = []
    monkeypatch.setattr(tables, "main", lambda: filled.append(True))
    names = [f"benchmarks/results/{name}" for name in ("one", "two", "three")]
    assert again.main([]) == 0 and capsys.readouterr().out.split() == names
    assert again.main([names[2], names[0]]) == 0
    assert log.read_text() == "one\nthree -o benchmarks/results/three\n" and filled == [True]
    assert again.main(names[1:]) == 1
    assert capsys.readouterr().err == "failed: benchmarks/results/two\n" and filled == [True, True]
    assert again.main(["benchmarks/results/four"]) == 1
    assert "no command in PAGE.md writes benchmarks/results/four" in capsys.readouterr().err
