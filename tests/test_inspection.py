"""What inspection shows: every run in order, true metrics, nothing unescaped."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from cli_fixtures import TEXT, save_tiny_model
from nugget2d import Memory, Nugget2D
from nugget2d.inspection import inspect_memory, inspect_text, print_inspection, to_html, to_json
from nugget2d.inspection.marks import LEVELS
from nugget2d.text.segmentation import spans_of
from nugget2d.text.visible import visible


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Nugget2D:
    return Nugget2D.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model"), name="tiny <&> model"))


@pytest.fixture(scope="module")
def memory(model: Nugget2D) -> Memory:
    return model.compress(TEXT, ratio=3)


@pytest.mark.parametrize("ratio", [1, 1.5, 4, 1000])
def test_runs_concatenate_to_the_text_and_hold_every_nugget(model: Nugget2D, ratio: float) -> None:
    memory = model.compress(TEXT, ratio=ratio)
    inspection = inspect_text(model, TEXT, memory)
    assert "".join(run.text for run in inspection.runs) == TEXT
    nuggets = [nugget for mark in inspection.marks for nugget in mark.nuggets]
    assert [nugget.position for nugget in nuggets] == memory.positions
    assert [nugget.span for nugget in nuggets] == memory.spans
    assert all(mark.start <= nugget.span[0] and nugget.span[1] <= mark.end for mark in inspection.marks
               for nugget in mark.nuggets)  # fmt: skip


def test_ranks_follow_scores_and_levels_follow_ranks(model: Nugget2D, memory: Memory) -> None:
    nuggets = [nugget for mark in inspect_text(model, TEXT, memory).marks for nugget in mark.nuggets]
    ordered = sorted(nuggets, key=lambda nugget: nugget.rank or 0)
    assert [nugget.rank for nugget in ordered] == list(range(1, memory.num_nuggets + 1))
    scores = [nugget.score for nugget in ordered]
    assert scores == sorted(scores, reverse=True, key=lambda score: score or 0)
    levels = [nugget.level for nugget in ordered]
    assert levels == sorted(levels, reverse=True)
    assert {1, LEVELS} <= set(levels) <= set(range(1, LEVELS + 1))


def test_a_memory_without_its_text_shows_the_reconstruction(model: Nugget2D, memory: Memory) -> None:
    inspection = inspect_memory(model, memory)
    assert inspection.reconstructed
    assert inspection.text == model.reconstruct(memory)
    assert "".join(run.text for run in inspection.runs) == inspection.text
    assert sum(len(mark.nuggets) for mark in inspection.marks) == memory.num_nuggets


def test_an_exact_memory_shows_its_true_text(model: Nugget2D) -> None:
    memory = model.compress(TEXT, ratio=3, exact=True)
    inspection = inspect_memory(model, memory)
    assert inspection.text == TEXT
    assert inspection == inspect_text(model, TEXT, memory)


@pytest.mark.parametrize("text", ["plain words", " 😀😀 é\r\n", "日本語 text", "bad \ufffd char", "\x00"])
def test_spans_of_tokens_tile_their_text(model: Nugget2D, text: str) -> None:
    ids = model.ids(text)[0].tolist()
    rebuilt, spans = spans_of(model.text, ids)
    assert rebuilt == text
    assert len(spans) == len(ids)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    tiles = sorted(set(spans))
    assert all(end == start for (_, end), (start, _) in pairwise(tiles))


def test_spans_of_tokens_that_end_inside_a_character(model: Nugget2D) -> None:
    ids = model.ids("a😀")[0].tolist()[:-1]
    text, spans = spans_of(model.text, ids)
    assert text == model.text(ids)
    assert len(spans) == len(ids)
    assert spans[-1][1] == len(text)


def test_json_holds_metrics_and_runs(model: Nugget2D, memory: Memory) -> None:
    parsed = json.loads(to_json(inspect_text(model, TEXT, memory)))
    assert "".join(run["text"] for run in parsed["runs"]) == TEXT
    assert (parsed["num_tokens"], parsed["num_nuggets"]) == (memory.num_tokens, memory.num_nuggets)
    nuggets = [nugget for run in parsed["runs"] for nugget in run["nuggets"]]
    assert [nugget["position"] for nugget in nuggets] == memory.positions
    assert [nugget["score"] for nugget in nuggets] == pytest.approx(memory.scores.tolist())


@pytest.mark.parametrize("selection", ["even", "random", "punctuation"])
def test_nuggets_have_scores_whether_or_not_the_selection_looks(model: Nugget2D, selection: str) -> None:
    memory = model.compress(TEXT, ratio=5, selection=selection)
    everything = model.compress(TEXT, ratio=1, selection="learned")
    scores = dict(zip(everything.positions, everything.scores.tolist(), strict=True))
    shown = {
        nugget.position: nugget.score for mark in inspect_text(model, TEXT, memory).marks for nugget in mark.nuggets
    }
    assert shown == pytest.approx({position: scores[position] for position in memory.positions}, abs=1e-5)


def _with_spans(memory: Memory, spans: torch.Tensor) -> Memory:
    return replace(memory, payload=replace(memory.kv, token_spans=spans))


class _Page(HTMLParser):
    """The text of the article, and every tag and attribute used."""

    def __init__(self) -> None:
        super().__init__()
        self.article = ""
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "article" in self.open:
            self.article += data


def test_page_escapes_everything_and_needs_no_other_file(model: Nugget2D, memory: Memory) -> None:
    text = TEXT[:-20] + "<script>alert(1)"
    page = to_html(inspect_text(model, text, _with_spans(memory, memory.token_spans.clamp(max=len(text)))))
    parsed = _Page()
    parsed.feed(page)
    assert not parsed.open
    assert not parsed.tags & {"script", "b", "img", "link", "iframe"}
    assert not parsed.attributes & {"src", "href", "onclick"}
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert "tiny &lt;&amp;&gt; model" in page and "tiny <" not in page
    # a CRLF that a nugget splits shows its CR
    assert parsed.article.replace("\u21b5\n", "\n").replace("␍\n", "\n") == visible(text, marked=False)
    assert f"{memory.num_tokens:,}" in page and f"{memory.nbytes:,} bytes" in page and 'lang="en"' in page
    assert re.search(r'title="token \d+, score -?\d+\.\d+ \(rank \d+\), characters \d+ to \d+"', page)


def test_a_dollar_sign_in_the_text_is_only_a_dollar_sign(model: Nugget2D) -> None:
    text = "It costs $text and $$5 or ${rows}."
    assert "$$5" in to_html(inspect_text(model, text, model.compress(text, ratio=50)))


def _terminal(inspection, **options) -> str:
    console = Console(file=StringIO(), width=80, **options)
    print_inspection(inspection, console)
    return console.file.getvalue()


def test_terminal_marks_nuggets_with_and_without_colour(model: Nugget2D, memory: Memory) -> None:
    inspection = inspect_text(model, TEXT, memory)
    plain = _terminal(inspection)
    assert plain.count("⟦") == len(inspection.marks) + 1  # one in the legend
    assert "\x1b" not in plain and "\x00" not in plain
    coloured = _terminal(inspection, force_terminal=True, color_system="truecolor")
    assert "⟦" not in coloured and "\x1b[30;48;2" in coloured
    assert "\x1b[31m" not in coloured  # the text's own escape must not reach the terminal


def test_overlapping_nuggets_of_one_character_become_one_mark(model: Nugget2D, memory: Memory) -> None:
    spans = memory.token_spans.clone()
    spans[:2] = torch.tensor([[0, 2], [1, 3]], dtype=torch.int32)
    inspection = inspect_text(model, TEXT, _with_spans(memory, spans))
    assert (inspection.marks[0].start, inspection.marks[0].end) == (0, 3)
    assert len(inspection.marks[0].nuggets) == 2


def test_a_memory_cannot_control_the_terminal_by_its_models_name(model: Nugget2D, memory: Memory) -> None:
    named = replace(memory, fingerprint=replace(memory.fingerprint, name="\x1b]0;mine\x07[bold]"))
    console = Console(file=StringIO(), width=200)
    print_inspection(inspect_memory(model, named), console)
    assert "\x1b" not in console.file.getvalue() and "[bold]" in console.file.getvalue()
