"""The break-even benchmark: ways that answer what `generate` does, arithmetic by hand, the command."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import tiny
from cli_fixtures import save_tiny_model
from nugget2d import Memory, Nugget2D
from nugget2d.cli.app import app
from nugget2d.errors import InputError, ModelError
from nugget2d.evaluation import breakeven
from nugget2d.evaluation.answering import answer_from_cache, answer_from_memory, answer_from_text, keep_cache
from nugget2d.evaluation.breakeven import Asked, Cost, Payoff, Round, payoff, summarize
from nugget2d.evaluation.breakeven_run import Settings, run_breakeven
from nugget2d.evaluation.breakeven_tables import markdown

CONTEXT, QUESTION, LENGTH = tiny.TEXT[:250], " What did the keeper count?", 6


def settings(model: Nugget2D, **changes: Any) -> Settings:
    fields = {"weights": "-", "data": "-", "data_sha256": "-", "lengths": (40, 80), "ratio": 4.0}
    return Settings(config=model.config, **(fields | {"question": 5, "answer": 3, "runs": 2} | changes))


# ---- the ways ----


def text_of(model: Nugget2D, answer: Iterator[torch.Tensor]) -> str:
    ids = [int(token) for token in answer]
    assert len(ids) == LENGTH
    return model.text(ids)


def test_every_way_answers_what_generate_does(model: Nugget2D, tmp_path: Path) -> None:
    """Of every architecture: a faster way that reads something else would be no way."""
    question = model.ids_after(QUESTION)
    options = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    whole = text_of(model, answer_from_text(model, CONTEXT, question, LENGTH))
    assert whole == model.generate(CONTEXT + QUESTION, eos_token_id=-1, **options)
    cache = keep_cache(model, CONTEXT, room=question.shape[1] + LENGTH)
    assert text_of(model, answer_from_cache(model, cache, question, LENGTH)) == whole

    memory = model.compress(CONTEXT, ratio=4)
    memory.save(tmp_path / "context.nugget")
    compact = text_of(model, answer_from_memory(model, tmp_path / "context.nugget", question, LENGTH))
    assert compact == model.generate(QUESTION, memory=memory, eos_token_id=-1, **options)
    assert compact != whole


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("memory", "other", "expected"),
    [
        (Cost(10, 2), Cost(0, 5), Payoff(4, None)),  # 10 + 4 x 2 < 4 x 5, but 10 + 3 x 2 > 3 x 5
        (Cost(9, 2), Cost(0, 5), Payoff(3, None)),  # 9 + 3 x 2 = 3 x 5
        (Cost(3, 2), Cost(4, 5), Payoff(1, None)),
        (Cost(5, 2), Cost(5, 2), Payoff(1, None)),
        (Cost(6, 2), Cost(5, 2), Payoff(None, None)),
        (Cost(6, 3), Cost(5, 2), Payoff(None, None)),
        (Cost(1, 3), Cost(5, 2), Payoff(1, 4)),  # 1 + 4 x 3 = 5 + 4 x 2, then the other way is cheaper
        (Cost(1, 3), Cost(1.5, 2), Payoff(None, None)),
    ],
)
def test_when_it_breaks_even(memory: Cost, other: Cost, expected: Payoff) -> None:
    assert payoff(memory, other) == expected


def round_of(compress: float, save: float, prefill: float, *asked: tuple[float, float]) -> Round:
    return Round(compress, save, prefill, *(Asked(*one) for one in asked))


def test_a_summary_by_hand() -> None:
    rounds = [
        round_of(4, 1, 3, (2, 4), (1, 2), (0.5, 1)),
        round_of(7, 1, 4, (3, 5), (1, 3), (0.5, 2)),
        round_of(5, 4, 20, (2, 3), (1, 2.5), (1.5, 3)),
    ]
    summary = summarize(rounds)
    seconds = summary["seconds"]
    assert seconds["compress"] == {"median": 5, "low": 4, "high": 7}
    # 5, 8 and 9: the median of sums, not the sum of medians
    assert seconds["once"]["memory"] == {"median": 8, "low": 5, "high": 9}
    assert seconds["once"]["cache"] == {"median": 4, "low": 3, "high": 20} and seconds["once"]["text"]["high"] == 0
    assert seconds["first_token"]["memory"] == {"median": 0.5, "low": 0.5, "high": 1.5}
    assert seconds["question"]["text"] == {"median": 4, "low": 3, "high": 5}
    assert summary["saved_per_question"] == {"text": 2, "cache": 0.5}
    assert summary["pays"] == {"text": {"first": 4, "last": None}, "cache": {"first": 8, "last": None}}
    assert [one["first"] for one in summary["pays_in_rounds"]["text"]] == [2, 3, None]
    assert summary["pays_in_rounds"]["cache"][2] == {"first": 1, "last": 22}
    assert summary["rounds"][1]["memory"] == {"first": 0.5, "whole": 2}


class FakeClock:
    """Time that passes only where it is said to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow(self, call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slowed(*arguments: Any, **options: Any) -> Any:
            self.now += seconds
            return call(*arguments, **options)

        return slowed

    def slow_answer(self, call: Callable[..., Iterator[Any]], first: float, rest: float) -> Callable[..., Any]:
        def slowed(*arguments: Any) -> Iterator[Any]:
            answer = call(*arguments)
            self.now += first
            yield next(answer)
            for token in answer:
                self.now += rest
                yield token

        return slowed


def test_every_second_is_booked_where_it_was_spent(
    llama: Nugget2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(llama, "compress", clock.slow(llama.compress, 100))
    monkeypatch.setattr(Memory, "save", clock.slow(Memory.save, 10))
    monkeypatch.setattr(breakeven, "keep_cache", clock.slow(keep_cache, 50))
    for name, first, rest in (("text", 30, 3), ("cache", 20, 2), ("memory", 7, 1)):
        call = getattr(breakeven, f"answer_from_{name}")
        monkeypatch.setattr(breakeven, f"answer_from_{name}", clock.slow_answer(call, first, rest))
    done: list[tuple[int, int]] = []
    report = run_breakeven(
        llama, [tiny.TEXT], settings(llama), tmp_path, clock=clock, on_progress=lambda *step: done.append(step)
    )
    assert done == [(tokens, 360) for tokens in (40, 80, 120, 200, 280, 360)]
    for context in report["contexts"]:
        one = round_of(100, 10, 50, (30, 36), (20, 24), (7, 9))
        assert summarize([one, one]).items() <= context.items()
        # 110 + 5 x 9 > 5 x 36 > 110 + 4 x 9, and 50 + 4 x 24 = 110 + 4 x 9
        assert context["pays"] == {"text": {"first": 5, "last": None}, "cache": {"first": 4, "last": None}}


# ---- command line ----


def bench(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["bench", "breakeven", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", context=64)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("A short one.", tiny.TEXT[:200])))
    out = tmp_path / "new" / "summary"
    options = ["--model", model, "--data", data, "--ratio", 4, "--question", 5, "--answer", 3, "--runs", 2]
    result = bench(*options, "--lengths", "40,400", "-o", out)

    report = json.loads((out / "breakeven.json").read_text())
    assert report["environment"]["versions"]["torch"] and report["settings"]["data"] == "texts.jsonl"
    short, long = report["contexts"]
    # segments are tokenized by themselves: a cut may add a token or two
    assert 40 <= short["tokens"] <= 42 and not short["beyond_context"]
    assert 400 <= long["tokens"] <= 410 and long["beyond_context"]
    assert len(long["rounds"]) == 2 and long["nuggets"] == pytest.approx(100, abs=3)
    # the start token's states are kept too: 3 layers, 2 heads of 8 numbers, keys and values
    assert short["bytes"]["cache"] == 41 * 3 * 2 * 8 * 2 * 4
    assert long["bytes"]["memory"] < long["bytes"]["cache"] / 2
    assert 0 < long["seconds"]["first_token"]["memory"]["low"] < long["seconds"]["question"]["memory"]["low"]

    page = (out / "breakeven.md").read_text()
    assert "| memory |" in page and f"| {long['tokens']}* |" in page and "64 tokens that this model continues" in page
    assert "text sent again" in result.stdout and "break-even" in result.stdout
    assert (out / "breakeven.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["breakeven.json", "breakeven.md", "breakeven.png"]

    for wrong, saying in (
        (["--lengths", "40"], "exists; pass --force"),
        (["--lengths", "a few"], "--lengths takes numbers"),
        (["--data", tmp_path / "missing.txt"], "matches no file"),
    ):
        error = bench(*options, *wrong, "-o", out, code=1).stderr
        assert error.startswith("error: ") and saying in error and error.count("\n") == 1
    assert json.loads((out / "breakeven.json").read_text()) == report
    bench(*options, "--lengths", "40", "-o", out, "--force")
    assert len(json.loads((out / "breakeven.json").read_text())["contexts"]) == 1


def test_what_cannot_be_measured_is_refused_before_measuring(llama: Nugget2D, tmp_path: Path) -> None:
    learned = tiny.make("gpt2")
    for model, texts, changes, error in (
        (llama, ["", " \n"], {}, InputError("there is no text")),
        (learned, [tiny.TEXT], {"lengths": (40, 1020)}, InputError("1029 positions are needed")),
        (learned, [tiny.TEXT], {"lengths": (40, 300)}, ModelError("memories of one segment only")),
        (tiny.make("mistral-window"), [tiny.TEXT], {"lengths": (40, 510)}, InputError("519 positions are needed")),
    ):
        with pytest.raises(type(error), match=str(error)):
            run_breakeven(model, texts, settings(model, **changes), tmp_path, clock=None, on_progress=forbidden)
    assert list(tmp_path.iterdir()) == []


def forbidden(*_: object) -> None:
    raise AssertionError("something was measured")


def test_verdicts_are_told_in_words(llama: Nugget2D) -> None:
    rounds = [
        round_of(4, 1, 3, (2, 4), (1, 2), (0.5, 1)),
        round_of(7, 1, 4, (3, 5), (1, 3), (0.5, 2)),
        round_of(5, 4, 20, (2, 3), (1, 2.5), (1.5, 3)),
    ]
    held = {"tokens": 40, "nuggets": 10, "beyond_context": False, "bytes": {"text": 1, "cache": 2000, "memory": 30}}
    contexts = [held | summarize(chosen) for chosen in (rounds, rounds[2:])]
    environment = {"hardware": "abacus", "threads": 1, "versions": {"torch": "2"}, "commit": None}
    page = markdown({"environment": environment, "settings": settings(llama).model_dump(), "contexts": contexts})
    first, second = page.split("| 40 | 10 | memory |")[:2]
    assert "| 2.0000 | 4 (2 .. never) |" in first and "| 0.5000 | 8 (1 to 22 .. 4) |" in first
    assert "| 0.0000 | never |" in second and "| -0.5000 | 1 to 22 |" in second
    assert "2,000" in first and "this model goes on from" not in page
