"""Nugget2D: chosen tokens' states from a trained encoder, segment by segment (arXiv 2310.02409).

A text longer than `config.window` is cut into segments of the lengths that the model was trained on. Nuggets are
distributed so that the whole text meets the budget. Segments are encoded in batches and joined: the time is linear in
the text.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from nugget2d.config import SelectionName
from nugget2d.errors import InputError
from nugget2d.memory.exact import ExactRecord
from nugget2d.memory.memory import Memory
from nugget2d.memory.states import row_nbytes
from nugget2d.methods.base import KVMethod, Progress, finish, native_dtype
from nugget2d.methods.budget import Budget
from nugget2d.methods.nugget.accuracy import meet_accuracy, warn_if_missed
from nugget2d.methods.nugget.encoding import BATCH_TOKENS, SegmentResult, batches, encode, logits_limit, measure
from nugget2d.methods.nugget.optimization import optimize, optimize_limit
from nugget2d.modeling.network import Network
from nugget2d.modeling.selection import count_nuggets, share_nuggets
from nugget2d.text.segmentation import TextSegment, split

# Tokens compressed between two pauses of `steps`.
STEP_TOKENS = 256


class NuggetMethod(KVMethod):
    """Encodes segments and keeps the states of selected tokens, which the decoder reads in place of the text.

    Attributes:
        selection: "learned", "window", "even", "random" or "punctuation"; None takes the model's own.
        exact: also store the tokens that greedy decoding would miss, so that `reconstruct` returns the identical
            string.
        target_accuracy: share of the tokens, above 0 and at most 1, that must be reconstructed (teacher-forced). Each
            segment gets the highest ratio that was measured to do so (accuracy.py); with `optimize_steps` the
            budget stays as given, and optimization stops at this accuracy.
        optimize_steps: the most gradient steps on the nuggets of every segment whose accuracy is below
            `target_accuracy` (1, if not given). Weights do not change; no accuracy is lower afterwards. Each step costs
            about as much as four passes over the text (optimization.py).
    """

    name: ClassVar[str] = "nugget2d"
    needs_training: ClassVar[bool] = True
    source: ClassVar[str] = "Qin et al. 2024, arXiv 2310.02409"
    default_ratio: ClassVar[float] = 20.0

    selection: SelectionName | None = None
    exact: bool = False
    target_accuracy: float | None = Field(default=None, gt=0, le=1)
    optimize_steps: int = Field(default=0, ge=0)

    def bound(self, model: Network) -> "NuggetMethod":
        """See `Method`."""
        return super().bound(model).model_copy(update={"selection": self.selection or model.config.selection})

    @property
    def sets_budget(self) -> bool:
        """Whether `target_accuracy` determines the ratio of each segment."""
        return self.target_accuracy is not None and not self.optimize_steps

    @torch.no_grad()
    def compress(
        self, model: Network, texts: Sequence[str], budget: Budget | None, on_progress: Progress | None = None
    ) -> list[Memory]:
        """See `Method`; measured accuracies are kept in the memories.

        Warns:
            AccuracyWarning: some segments miss `target_accuracy`; they keep the states with the best measured accuracy.
        """
        documents = [_cut(model, text, number) for number, text in enumerate(texts)]
        return finish(self._for(model)._compress(model, documents, budget, on_progress, BATCH_TOKENS))

    def steps(self, model: Network, texts: Sequence[str], budget: Budget | None) -> Generator[int, None, list[Memory]]:
        """See `Method`: a few segments at a time, or gradient steps on them."""
        mine = self._for(model)
        documents = [_cut(model, text, number) for number, text in enumerate(texts)]
        left = sum(len(segment.ids) for document in documents for segment in document)
        if mine.sets_budget or mine.optimize_steps or mine.exact:
            pauses = mine._compress(model, documents, budget, None, STEP_TOKENS)
            return (yield from _with_size(pauses, left))
        memories = []
        for document in documents:
            results: list[SegmentResult] = []
            counts = mine._counts(model, document, budget)
            while len(results) < len(document):
                end = _step_end(document, len(results))
                part = slice(len(results), end)
                results += encode(model, document[part], counts[part], mine)
                left -= sum(len(segment.ids) for segment in document[part])
                if left:
                    yield left
            memories.append(mine._assemble(results))
        return memories

    # ---- internals ----

    def _for(self, model: Network) -> "NuggetMethod":
        model.require_compressor()
        return self.bound(model)

    def _compress(
        self,
        model: Network,
        documents: Sequence[Sequence[TextSegment]],
        budget: Budget | None,
        on_progress: Progress | None,
        most: int,
    ) -> Generator[None, None, list[Memory]]:
        """Batches have at most `most` tokens, or one segment."""
        segments = [segment for document in documents for segment in document]
        if self.sets_budget:
            if budget is not None:
                raise InputError(
                    "target_accuracy chooses the ratio: give one of them, or optimize_steps as well, to stop at that "
                    "accuracy"
                )
            results = yield from meet_accuracy(model, segments, self.target_accuracy or 1.0, self, on_progress, most)
        else:
            counts = [count for document in documents for count in self._counts(model, document, budget)]
            results = yield from self._encode(model, segments, counts, on_progress, most)
        if self.target_accuracy is not None:
            remedy = "every ratio was tried" if self.sets_budget else "optimize longer or lower the ratio"
            warn_if_missed(results, self.target_accuracy, remedy)
        ready = iter(results)
        return [self._assemble([next(ready) for _ in document]) for document in documents]

    def _counts(self, model: Network, document: Sequence[TextSegment], budget: Budget | None) -> list[int]:
        """Nuggets of each segment of one text."""
        budget = budget or Budget(ratio=self.default_ratio)
        lengths = [len(segment.ids) for segment in document]
        if budget.ratio is not None:
            return count_nuggets(lengths, budget.ratio)
        heads = model.readable.kv_shape
        nbytes = sum(2 * count * row_nbytes(width, self.dtype or native_dtype(model)) for count, width in heads)
        return share_nuggets(lengths, budget.count(sum(lengths), nbytes))

    def _encode(
        self,
        model: Network,
        segments: Sequence[TextSegment],
        counts: Sequence[int],
        on_progress: Progress | None,
        most: int,
    ) -> Generator[None, None, list[SegmentResult]]:
        def work(batch: list[int]) -> Generator[None, None, list[SegmentResult]]:
            encoded = encode(model, [segments[i] for i in batch], [counts[i] for i in batch], self)
            if self.optimize_steps:
                target = 1.0 if self.target_accuracy is None else self.target_accuracy
                return (yield from optimize(model, encoded, self.optimize_steps, target))
            return measure(model, encoded) if self.exact else encoded

        limit = min(most, optimize_limit(model)) if self.optimize_steps else most
        limit = min(limit, logits_limit(model)) if self.exact else limit
        return (yield from _in_batches(segments, limit, work, on_progress))

    def _assemble(self, document: Sequence[SegmentResult]) -> Memory:
        memory = Memory.join([result.memory for result in document])
        if not self.exact:
            return memory
        record = ExactRecord.make([result.segment.text for result in document], [result.patch for result in document])
        return replace(memory, exact=record)


def _step_end(document: Sequence[TextSegment], start: int) -> int:
    """The end of the segments from `start` on that together have `STEP_TOKENS` tokens at most, or one that has more."""
    end, tokens = start + 1, len(document[start].ids)
    while end < len(document) and tokens + len(document[end].ids) <= STEP_TOKENS:
        tokens += len(document[end].ids)
        end += 1
    return end


def _cut(model: Network, text: str, number: int) -> list[TextSegment]:
    segments = split(model.tokenizer, text, model.config.window)
    if not segments:
        raise InputError(f"text {number} is empty; there is nothing to compress")
    return segments


def _with_size(pauses: Generator[None, None, list[Memory]], size: int) -> Generator[int, None, list[Memory]]:
    """The same pauses, each with a number: how much is left is not known."""
    while True:
        try:
            next(pauses)
        except StopIteration as end:
            memories: list[Memory] = end.value
            return memories
        yield size


def _in_batches(
    segments: Sequence[TextSegment],
    limit: int,
    work: Callable[[list[int]], Generator[None, None, list[SegmentResult]]],
    on_progress: Progress | None,
) -> Generator[None, None, list[SegmentResult]]:
    """`work` on the indices of batch after batch, with pauses; its results in the order of `segments`."""
    results: dict[int, SegmentResult] = {}
    for batch in batches(segments, limit):
        results |= zip(batch, (yield from work(batch)), strict=True)
        if on_progress is not None:
            on_progress(len(results), len(segments))
        yield
    return [results[index] for index in range(len(segments))]
