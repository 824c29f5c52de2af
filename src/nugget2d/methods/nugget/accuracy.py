"""Target accuracy: for each segment the fewest nuggets whose measured accuracy is sufficient.

Accuracy mostly grows with the number of nuggets, but not strictly. What is guaranteed: every count that is returned
was itself measured, on the states as they will be kept, to meet the target. Fewer nuggets that meet it too may exist.
"""

from collections.abc import Callable, Generator, Sequence
from math import ceil

from nugget2d.errors import AccuracyWarning, warn
from nugget2d.methods.nugget.encoding import (
    BATCH_TOKENS,
    EncodeOptions,
    SegmentResult,
    batches,
    encode,
    logits_limit,
    measure,
)
from nugget2d.modeling.network import Network
from nugget2d.text.segmentation import TextSegment

# The search starts here and doubles the nuggets until they suffice: ratios 50, 25, 12.5, ... 1.
FIRST_RATIO = 50


class _Search:
    """The search for one segment: double the count until it suffices, then bisect below it."""

    def __init__(self, segment: TextSegment) -> None:
        """Nothing measured yet."""
        self.segment = segment
        self.failed = 0  # the highest count that was measured to miss, always below the one that passed
        self.passed: SegmentResult | None = None
        self.best: SegmentResult | None = None

    @property
    def next(self) -> int | None:
        """The count to measure next; None when the search is done."""
        if self.passed is not None:
            return (self.failed + self.passed.count) // 2 if self.passed.count - self.failed > 1 else None
        length = len(self.segment.ids)
        return min(length, 2 * self.failed or ceil(length / FIRST_RATIO)) if self.failed < length else None

    def update(self, result: SegmentResult, target: float) -> None:
        """Record the measurement of `next`."""
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
    most: int = BATCH_TOKENS,
) -> Generator[None, None, list[SegmentResult]]:
    """A measured result of each segment, with as few nuggets as meet `target`; all open searches share batches.

    It pauses after each batch, of at most `most` tokens or one segment.
    """
    searches = [_Search(segment) for segment in segments]
    while rows := [(search, count) for search in searches if (count := search.next) is not None]:
        for batch in batches([search.segment for search, _ in rows], min(most, logits_limit(model))):
            open_searches, counts = zip(*(rows[index] for index in batch), strict=True)
            results = encode(model, [search.segment for search in open_searches], counts, options)
            for search, result in zip(open_searches, measure(model, results), strict=True):
                search.update(result, target)
            if on_progress is not None:
                on_progress(sum(search.next is None for search in searches), len(searches))
            yield
    return [search.result for search in searches]


def warn_if_missed(results: Sequence[SegmentResult], target: float, remedy: str) -> None:
    """Warn once about the segments that miss the target.

    Warns:
        AccuracyWarning: at least one does.
    """
    missed = [result.accuracy for result in results if result.accuracy < target]
    if missed:
        warn(
            f"{len(missed)} of {len(results)} segments miss target_accuracy {target:g}: their accuracy is "
            f"{sum(missed) / len(missed):.4f} on average, {min(missed):.4f} at worst; {remedy}",
            AccuracyWarning,
        )
