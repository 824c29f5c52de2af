"""The fewest nuggets that read well enough: a ratio for each segment, chosen by measured accuracy.

Accuracy mostly grows with the number of nuggets, but not strictly. What is guaranteed: every count that is returned
was itself measured, on the states as they will be kept, to meet the target. Fewer nuggets that meet it too may exist.
"""

import warnings
from collections.abc import Callable, Sequence
from math import ceil

from nugget2d.errors import QualityWarning
from nugget2d.methods.nugget.encoding import EncodeOptions, SegmentResult, batches, encode, logits_limit, measure
from nugget2d.modeling.network import Network
from nugget2d.text.segmentation import TextSegment

# The search begins here and doubles the nuggets until they suffice: a ladder of ratios 50, 25, 12.5, ... 1.
FIRST_RATIO = 50


class _Search:
    """The search for one segment: climb the ladder until a count suffices, then bisect below it."""

    def __init__(self, segment: TextSegment) -> None:
        """Nothing is known yet."""
        self.segment = segment
        self.failed = 0  # the highest count that was measured to miss, always below the one that passed
        self.passed: SegmentResult | None = None
        self.best: SegmentResult | None = None

    @property
    def next(self) -> int | None:
        """The count to measure, None when there is nothing left to find out."""
        if self.passed is not None:
            return (self.failed + self.passed.count) // 2 if self.passed.count - self.failed > 1 else None
        length = len(self.segment.ids)
        return min(length, 2 * self.failed or ceil(length / FIRST_RATIO)) if self.failed < length else None

    def learn(self, result: SegmentResult, target: float) -> None:
        """What came of the count that was asked for."""
        if self.best is None or result.accuracy > self.best.accuracy:
            self.best = result
        if result.accuracy >= target:
            self.passed = result
        else:
            self.failed = result.count

    @property
    def result(self) -> SegmentResult:
        """The fewest nuggets that were measured to suffice, or else the best that was measured."""
        found = self.passed or self.best
        if found is None:
            raise RuntimeError("nothing was measured yet")
        return found


def meet_accuracy(
    model: Network,
    segments: Sequence[TextSegment],
    target: float,
    options: EncodeOptions,
    on_progress: Callable[[int, int], None] | None,
) -> list[SegmentResult]:
    """A measured result of each segment, of as few nuggets as meet `target`; all open searches go on side by side."""
    searches = [_Search(segment) for segment in segments]
    while rows := [(search, count) for search in searches if (count := search.next) is not None]:
        for batch in batches([search.segment for search, _ in rows], logits_limit(model)):
            open_searches, counts = zip(*(rows[index] for index in batch), strict=True)
            results = encode(model, [search.segment for search in open_searches], counts, options)
            for search, result in zip(open_searches, measure(model, results), strict=True):
                search.learn(result, target)
            if on_progress is not None:
                on_progress(sum(search.next is None for search in searches), len(searches))
    return [search.result for search in searches]


def warn_if_missed(results: Sequence[SegmentResult], target: float, remedy: str) -> None:
    """Say once how many segments miss the target, and by how much.

    Warns:
        QualityWarning: at least one does.
    """
    missed = [result.accuracy for result in results if result.accuracy < target]
    if missed:
        warnings.warn(
            f"{len(missed)} of {len(results)} segments miss target_accuracy {target:g}: their accuracy is "
            f"{sum(missed) / len(missed):.4f} on average, {min(missed):.4f} at worst; {remedy}",
            QualityWarning,
            stacklevel=5,
        )
