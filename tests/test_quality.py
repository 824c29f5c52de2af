"""Compression to a measured quality: the highest ratio that reads back well enough, and a memory that knows it."""

import json
import warnings
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.cli.app import app
from nugget2d.errors import AccuracyWarning, InputError
from nugget2d.methods.nugget.accuracy import _Search
from nugget2d.methods.nugget.encoding import SegmentResult, measure
from nugget2d.text.segmentation import TextSegment, split

pytestmark = pytest.mark.slow

DOCUMENT = (resources.files("nugget2d") / "cli" / "demo.txt").read_text(encoding="utf-8")
# what a model of English has hardly seen, after its own language
ENGLISH = DOCUMENT[: DOCUMENT.index("\n", 600) + 1]
MIXED = ENGLISH + "灯塔看守人每天晚上都在日志上写字。他数着帆船。“七艘。”\n" * 5


@pytest.fixture(scope="module")
def nano() -> Nugget2D:
    return Nugget2D.from_pretrained("nano")


@pytest.fixture(scope="module")
def mixed(nano: Nugget2D) -> Memory:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        return nano.compress(MIXED, target_accuracy=0.5, dtype="int8")


def remeasured(model: Nugget2D, text: str, memory: Memory) -> list[float]:
    """Accuracy of every segment, from the memory and the text alone."""
    sources = split(model.tokenizer, text, model.config.window)
    accuracies = []
    for number, source in enumerate(sources):
        alone = memory.segment(number)
        with torch.no_grad():
            accuracies.append(measure(model, [SegmentResult(source, alone, {})])[0].accuracy)
    return accuracies


# ---- what is asked ----


def test_ratio_and_quality_exclude_one_another(llama: Nugget2D) -> None:
    with pytest.raises(InputError, match="give one of them"):
        llama.compress("The dog.", ratio=4, target_accuracy=0.9)


@pytest.mark.parametrize("quality", [0, -0.5, 1.01, float("nan")])
def test_quality_is_a_share(llama: Nugget2D, quality: float) -> None:
    with pytest.raises(InputError, match="target_accuracy"):
        llama.compress("The dog.", target_accuracy=quality)


def test_neither_means_a_ratio_of_20(llama: Nugget2D) -> None:
    assert llama.compress(tiny.TEXT).num_nuggets == llama.compress(tiny.TEXT, ratio=20).num_nuggets
    assert llama.compress(tiny.TEXT).accuracy is None


# ---- the search ----


def found(length: int, needed: int) -> tuple[SegmentResult, list[int]]:
    """The search over a segment that needs `needed` nuggets, and the counts that it tried."""
    text = "x" * length
    model = tiny.trained("llama", "copies")
    memory = model.compress("x", ratio=1)
    search = _Search(TextSegment(text, 0, list(range(length)), []))
    tried = []
    while (count := search.next) is not None:
        tried.append(count)
        segment = replace(memory.segments[0], num_nuggets=count, accuracy=min(1.0, count / needed))
        payload = memory.kv.pick(torch.zeros(count, dtype=torch.long))  # so many copies of its one nugget
        measured = replace(memory, payload=payload, segments=(segment,))
        search.update(SegmentResult(search.segment, measured, {}), 1.0)
    return search.result, tried


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 63, 99, 100])
def test_the_fewest_that_suffice_are_found(needed: int) -> None:
    result, tried = found(100, needed)
    assert result.count == needed
    assert len(set(tried)) == len(tried) <= 14


def test_when_nothing_suffices_the_best_is_kept() -> None:
    result, tried = found(100, 130)
    assert result.count == 100
    assert tried == [2, 4, 8, 16, 32, 64, 100]


def test_an_easy_target_gives_the_highest_ratio(nano: Nugget2D) -> None:
    memory = nano.compress(ENGLISH, target_accuracy=0.001)
    assert [segment.num_nuggets for segment in memory.segments] == [1] * len(memory.segments)


def test_hard_segments_get_more_nuggets(mixed: Memory) -> None:
    english = [s.num_tokens / s.num_nuggets for s in mixed.segments if s.end <= len(ENGLISH)]
    other = [s.num_tokens / s.num_nuggets for s in mixed.segments if s.start >= len(ENGLISH)]
    assert min(english) > max(other)


def test_a_missed_target_is_said_once(llama: Nugget2D) -> None:
    with pytest.warns(AccuracyWarning, match="segments miss target_accuracy 0.9") as caught:
        memory = llama.compress(tiny.TEXT, target_accuracy=0.9)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert memory.accuracy is not None and memory.accuracy < 0.9


# ---- what the memory knows ----


def test_accuracy_is_that_of_the_file(nano: Nugget2D, mixed: Memory, tmp_path: Path) -> None:
    mixed.save(tmp_path / "a.nugget")
    loaded = Memory.load(tmp_path / "a.nugget")
    assert loaded.segments == mixed.segments
    again = remeasured(nano, MIXED, loaded)
    assert [segment.accuracy for segment in loaded.segments] == pytest.approx(again)
    weighted = sum(a * s.num_tokens for a, s in zip(again, loaded.segments, strict=True)) / loaded.num_tokens
    assert loaded.accuracy == pytest.approx(weighted)


def test_joins_keep_accuracies_and_another_dtype_drops_them(nano: Nugget2D, mixed: Memory) -> None:
    assert [s.accuracy for s in Memory.join([mixed, mixed]).segments] == 2 * [s.accuracy for s in mixed.segments]
    assert mixed.to("float32").accuracy is None
    assert Memory.join([mixed, nano.compress("The dog.", ratio=2, dtype="int8")]).accuracy is None


def test_exact_mode_patches_what_quality_leaves(nano: Nugget2D) -> None:
    memory = nano.compress(ENGLISH, target_accuracy=0.5, exact=True)
    assert 0.5 <= memory.accuracy < 1
    assert nano.reconstruct(memory) == ENGLISH


# ---- the command ----


def test_the_command_reports_what_it_chose(tmp_path: Path) -> None:
    folder, text, out = tmp_path / "model", tmp_path / "a.txt", tmp_path / "a.nugget"
    tiny.trained("llama", "copies", name=str(folder)).save_pretrained(folder)
    text.write_text(tiny.TEXT, encoding="utf-8")

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)))

    compress = ["compress", text, "-o", out, "--model", folder, "--quality", 0.9]
    both = run(*compress, "--ratio", 4)
    assert both.exit_code == 1 and "give one of them" in both.stderr
    assert not out.exists()
    done = run(*compress)
    assert done.exit_code == 0, done.output
    assert "segments miss target_accuracy 0.9" in done.stderr
    memory = Memory.load(out)
    assert f"{memory.accuracy:.4f}" in done.stdout and "segment ratio" in done.stdout
    assert f"measured accuracy {memory.accuracy:.4f}" in run("inspect", out).stdout
    assert json.loads(run("inspect", out, "--json").stdout)["accuracy"] == memory.accuracy
