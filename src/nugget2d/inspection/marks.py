"""A text divided into runs: stretches between nuggets, and the tokens that became nuggets.

With the source text (given, or in an exact memory) the runs are parts of it. An ordinary memory does not hold its
text: then they are parts of what the model reconstructs, with each nugget at its index in the token sequence.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch

from nugget2d.errors import InputError
from nugget2d.inference.reconstruction import reconstruct_ids
from nugget2d.memory.memory import Memory
from nugget2d.model import Nugget2D
from nugget2d.modeling.selection import SCORED
from nugget2d.text.segmentation import spans_of, tokenize

LEVELS = 5  # shades of highlighting


@dataclass(frozen=True)
class Nugget:
    """A token that was kept.

    Attributes:
        position: its index in the whole token sequence.
        span: characters [start, end) of it in the source text.
        score: its scorer's value, or, of methods without a scorer, the share of heads that keep it.
        rank: 1 for the highest score of the memory.
        level: shade, 1 (lowest fifth of the scores) to `LEVELS`.
    """

    position: int
    span: tuple[int, int]
    score: float
    rank: int
    level: int


@dataclass(frozen=True)
class Mark:
    """Characters [start, end) of the text that is shown, and the nuggets there: several if they share a character."""

    start: int
    end: int
    nuggets: tuple[Nugget, ...]

    @property
    def level(self) -> int:
        """The strongest shade of its nuggets."""
        return max(nugget.level for nugget in self.nuggets)


@dataclass(frozen=True)
class Run:
    """A part of the text that is shown; `mark` is None between nuggets."""

    text: str
    mark: Mark | None = None


@dataclass(frozen=True)
class Inspection:
    """A text, its nuggets and the metrics of its memory.

    `reconstructed` tells whether the text is a reconstruction; `accuracy` is the measured one of the memory, if any.
    """

    text: str
    marks: tuple[Mark, ...]
    reconstructed: bool
    model: str
    num_tokens: int
    num_nuggets: int
    ratio: float
    nbytes: int
    full_nbytes: int
    accuracy: float | None

    @property
    def runs(self) -> list[Run]:
        """The text in order; the runs concatenate to it."""
        runs, shown = [], 0
        for mark in self.marks:
            runs += [Run(self.text[shown : mark.start]), Run(self.text[mark.start : mark.end], mark)]
            shown = mark.end
        return [run for run in (*runs, Run(self.text[shown:])) if run.text or run.mark]


def inspect_text(model: Nugget2D, text: str, memory: Memory) -> Inspection:
    """What `memory` kept of `text`, the text that `model` made it from.

    Raises:
        InputError: `memory` has nuggets beyond the tokens of this text.
    """
    ids = [tokenize(model.tokenizer, text[segment.start : segment.end])[0] for segment in memory.segments]
    return _inspection(text, memory.spans, memory, _scores(model, memory, ids), reconstructed=False)


def inspect_memory(
    model: Nugget2D, memory: Memory, on_progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """What `memory` kept, shown on its exact text if it has one, else on the text that `model` reconstructs.

    Raises:
        MismatchError: the memory was made by another model.
        InputError: it has nuggets beyond the tokens of its exact text.
    """
    if memory.exact is not None:
        return inspect_text(model, model.reconstruct(memory, on_progress=on_progress), memory)
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    local = memory.local_positions.tolist()
    first = start = 0
    decoded = reconstruct_ids(model, [memory], on_progress)[0]
    for ids, segment in zip(decoded, memory.segments, strict=True):
        text, token_spans = spans_of(model.text, ids)
        chosen = local[first : first + segment.num_nuggets]
        spans += [(start + token_spans[index][0], start + token_spans[index][1]) for index in chosen]
        texts.append(text)
        first += segment.num_nuggets
        start += len(text)
    return _inspection("".join(texts), spans, memory, _scores(model, memory, decoded), reconstructed=True)


def to_json(inspection: Inspection) -> str:
    """The metrics, and the runs in order (`nuggets` is empty between nuggets), as one JSON object and a newline."""
    metrics = {name: value for name, value in vars(inspection).items() if name not in ("text", "marks")}
    runs = [
        {"text": run.text, "nuggets": [asdict(nugget) for nugget in run.mark.nuggets] if run.mark else []}
        for run in inspection.runs
    ]
    return json.dumps({**metrics, "runs": runs}, ensure_ascii=False, allow_nan=False) + "\n"


@torch.no_grad()
def _scores(model: Nugget2D, memory: Memory, segments: Sequence[Sequence[int]]) -> list[float]:
    """The scorer's value of each nugget; memories hold them only if nuggets were chosen by them."""
    if memory.reader.role != "decoder" or memory.method.config.get("selection") in tuple(SCORED):
        return cast(list[float], memory.scores.tolist())
    local = [memory.local_positions[own].long() for own in memory.segment_slices]
    if any(positions[-1] >= len(ids) for positions, ids in zip(local, segments, strict=True)):
        raise InputError("this memory has nuggets beyond the tokens of this text, so it was made of another one")
    parts = [
        model.token_scores(torch.tensor([ids], device=model.device))[0].cpu()[positions]
        for ids, positions in zip(segments, local, strict=True)
    ]
    return cast(list[float], torch.cat(parts).tolist())


def _inspection(
    text: str, spans: Sequence[tuple[int, int]], memory: Memory, scores: list[float], *, reconstructed: bool
) -> Inspection:
    marks: list[Mark] = []
    for (start, end), nugget in zip(spans, _nuggets(memory, scores), strict=True):
        if (
            nugget.rank > memory.num_nuggets
        ):  # heads differ: as many are shown as a head keeps, those that most heads keep
            continue
        if marks and start < marks[-1].end:
            # two tokens hold bytes of one character
            last = marks.pop()
            marks.append(Mark(last.start, max(last.end, end), (*last.nuggets, nugget)))
        else:
            marks.append(Mark(start, end, (nugget,)))
    return Inspection(
        text=text,
        marks=tuple(marks),
        reconstructed=reconstructed,
        model=memory.fingerprint.name,
        num_tokens=memory.num_tokens,
        num_nuggets=memory.num_nuggets,
        ratio=memory.ratio,
        nbytes=memory.nbytes,
        full_nbytes=memory.full_nbytes,
        accuracy=memory.accuracy,
    )


def _nuggets(memory: Memory, scores: list[float]) -> list[Nugget]:
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    ranks = {index: rank for rank, index in enumerate(order, start=1)}
    return [
        Nugget(position, span, score, ranks[index], LEVELS - (ranks[index] - 1) * LEVELS // memory.num_nuggets)
        for index, (position, span, score) in enumerate(zip(memory.positions, memory.spans, scores, strict=True))
    ]
