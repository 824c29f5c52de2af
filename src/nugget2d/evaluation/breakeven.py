"""Break-even: the number of questions about one context from which its memory costs less than the alternatives.

The costs of three ways to answer questions about a context, ONCE and with EACH question:

- text: nothing once; each question reads context and question again.
- cache: the context is read once and its KV cache stays in the model's memory; each question is read after it.
- memory: the context is compressed and written to a file once; each question loads the file, rotates the keys to the
  positions of the context's segments, reads the question.

Every way then generates the same number of tokens (answering.py). Loading the model is not counted; tokenizing the
context is, every time a way does it. The file is read soon after it was written, so mostly from the system's page
cache. Every round measures each cost once, in turns, so that other work on the machine affects all alike.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nugget2d.config import Frozen
from nugget2d.evaluation.answering import answer_from_cache, answer_from_memory, answer_from_text, keep_cache
from nugget2d.model import Nugget2D
from nugget2d.modeling.cache import cached_states

Clock = Callable[[], float]
Result = TypeVar("Result")


class Plan(Frozen):
    """What is measured of each context.

    Attributes:
        ratio: tokens for each nugget.
        answer: tokens of an answer.
        runs: how often everything is measured, after one time that is not counted.
    """

    ratio: float
    answer: int
    runs: int


class Cost(NamedTuple):
    """Seconds of one way: before any question, and with each."""

    once: float
    each: float


class Payoff(NamedTuple):
    """The range of numbers of questions for which the memory costs no more than another way: first and last.

    Both are None if there is no such number, `last` is None if the range has no end.
    """

    first: int | None
    last: int | None


@dataclass(frozen=True)
class Asked:
    """Seconds of one question, until its answer's first token and until its last."""

    first: float
    whole: float


@dataclass(frozen=True)
class Round:
    """Seconds of everything, each once: what is done once, then one question in each way."""

    compress: float
    save: float
    prefill: float
    text: Asked
    cache: Asked
    memory: Asked

    @property
    def costs(self) -> dict[str, Cost]:
        """Of each way."""
        return {
            "text": Cost(0.0, self.text.whole),
            "cache": Cost(self.prefill, self.cache.whole),
            "memory": Cost(self.compress + self.save, self.memory.whole),
        }


def payoff(memory: Cost, other: Cost) -> Payoff:
    """When the total of `memory` is at most that of `other`."""
    ahead, saved = other.once - memory.once, other.each - memory.each
    if saved > 0:
        return Payoff(max(1, math.ceil(-ahead / saved)), None)
    if ahead + saved < 0:
        return Payoff(None, None)
    return Payoff(1, math.floor(ahead / -saved) if saved else None)


def measure_context(
    model: Nugget2D,
    context: str,
    question: Tensor,
    plan: Plan,
    file: Path,
    clock: Clock,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """One entry of a report's `contexts` (see `breakeven_run`), for the (1, q) ids of `question`.

    The memory is written to `file`. `on_round` is called with the rounds done, the one that is not counted included.
    """
    rounds = []
    for measured in range(1, plan.runs + 2):
        one, held = _measure_round(model, context, question, plan, file, clock)
        rounds.append(one)
        if on_round is not None:
            on_round(measured)
    return held | summarize(rounds[1:])


def _measure_round(
    model: Nugget2D, context: str, question: Tensor, plan: Plan, file: Path, clock: Clock
) -> tuple[Round, dict[str, Any]]:
    """Everything once, and the sizes; a function of its own, so that only one cache is held at a time."""
    room = question.shape[1] + plan.answer
    memory, compress = _timed(clock, model.compress, context, ratio=plan.ratio)
    file_bytes, save = _timed(clock, memory.save, file)
    cache, prefill = _timed(clock, keep_cache, model, context, room)
    keys, values = cached_states(cache)
    held = {
        "tokens": memory.num_tokens,
        "nuggets": memory.num_nuggets,
        "beyond_context": memory.num_tokens > model.config.context,
        "bytes": {
            "text": len(context.encode()),
            "cache": sum(states.nbytes for states in (*keys, *values)),
            "memory": file_bytes,
        },
    }
    return Round(
        compress=compress,
        save=save,
        prefill=prefill,
        text=_asked(clock, answer_from_text(model, context, question, plan.answer)),
        cache=_asked(clock, answer_from_cache(model, cache, question, plan.answer)),
        memory=_asked(clock, answer_from_memory(model, file, question, plan.answer)),
    ), held


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians with the lowest and highest of all rounds, and the break-even points.

    Returns:
        seconds: of compressing and of saving; of each way what is done once, a question until its answer's first token,
        and a question in all.
        saved_per_question: seconds, against text and cache, by the medians; below 0 where the memory takes longer.
        pays, pays_in_rounds: the `Payoff` against text and cache of the medians, and of each round by itself.
        rounds: all seconds as measured.
    """
    costs = [one.costs for one in rounds]
    ways = {
        way: Cost(*(median(amounts) for amounts in zip(*(cost[way] for cost in costs), strict=True)))
        for way in costs[0]
    }
    others = ("text", "cache")
    return {
        "seconds": {
            "compress": _spread(one.compress for one in rounds),
            "save": _spread(one.save for one in rounds),
            "once": {way: _spread(cost[way].once for cost in costs) for way in ways},
            "first_token": {way: _spread(getattr(one, way).first for one in rounds) for way in ways},
            "question": {way: _spread(cost[way].each for cost in costs) for way in ways},
        },
        "saved_per_question": {way: ways[way].each - ways["memory"].each for way in others},
        "pays": {way: payoff(ways["memory"], ways[way])._asdict() for way in others},
        "pays_in_rounds": {way: [payoff(cost["memory"], cost[way])._asdict() for cost in costs] for way in others},
        "rounds": [asdict(one) for one in rounds],
    }


def device_clock(device: torch.device) -> Clock:
    """A clock in seconds that first waits for the work given to `device`."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def _timed(clock: Clock, call: Callable[..., Result], *arguments: Any, **options: Any) -> tuple[Result, float]:
    start = clock()
    result = call(*arguments, **options)
    return result, clock() - start


def _asked(clock: Clock, answer: Iterator[Tensor]) -> Asked:
    start = clock()
    next(answer)
    first = clock()
    for _ in answer:
        pass
    return Asked(first - start, clock() - start)


def _spread(seconds: Iterable[float]) -> dict[str, float]:
    values = list(seconds)
    return {"median": median(values), "low": min(values), "high": max(values)}
