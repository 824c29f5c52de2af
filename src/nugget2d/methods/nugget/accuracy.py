"""The fewest nuggets that read well enough: a ratio for each segment, chosen by measured accuracy.

Accuracy mostly grows with the number of nuggets, but not strictly. What is guaranteed: every count that is returned
was itself measured, on the states as they will be kept, to meet the target. Fewer nuggets that meet it too may exist.
"""

import warnings
from collections.abc import Callable, Sequence
from math import ceil

from nugget2d.config import SelectionName
from nugget2d.errors import QualityWarning
from nugget2d.memory.states import StoreDtype
from nugget2d.methods.nugget.encoding import Draft, batches, encode, logits_limit, measure
from nugget2d.modeling.network import Network
from nugget2d.text.segmentation import Piece

# The search begins here and doubles the nuggets until they suffice: a ladder of ratios 50, 25, 12.5, ... 1.
FIRST_RATIO = 50


class _Search:
    """The search for one segment: climb the ladder until a count suffices, then bisect below it."""

    def __init__(self, piece: Piece) -> None:
        """Nothing is known yet."""
        self.piece = piece
        self.failed = 0  # the highest count that was measured to miss, always below the one that passed
        self.passed: Draft | None = None
        self.best: Draft | None = None

    @property
    def next(self) -> int | None:
        """The count to measure, None when there is nothing left to find out."""
        if self.passed is not None:
            return (self.failed + self.passed.count) // 2 if self.passed.count - self.failed > 1 else None
        length = len(self.piece.ids)
        return min(length, 2 * self.failed or ceil(length / FIRST_RATIO)) if self.failed < length else None

    def learn(self, draft: Draft, target: float) -> None:
        """What came of the count that was asked for."""
        if self.best is None or draft.accuracy > self.best.accuracy:
            self.best = draft
        if draft.accuracy >= target:
            self.passed = draft
        else:
            self.failed = draft.count

    @property
    def result(self) -> Draft:
        """The fewest nuggets that were measured to suffice, or else the best that was measured."""
        found = self.passed or self.best
        if found is None:
            raise RuntimeError("nothing was measured yet")
        return found


def meet_quality(
    model: Network,
    pieces: Sequence[Piece],
    target: float,
    selection: SelectionName,
    store: StoreDtype,
    on_progress: Callable[[int, int], None] | None,
) -> list[Draft]:
    """A measured draft of each piece, of as few nuggets as meet `target`; all open searches go on side by side."""
    searches = [_Search(piece) for piece in pieces]
    while rows := [(search, count) for search in searches if (count := search.next) is not None]:
        for batch in batches([search.piece for search, _ in rows], logits_limit(model)):
            open_searches, counts = zip(*(rows[index] for index in batch), strict=True)
            drafts = encode(model, [search.piece for search in open_searches], counts, selection, store)
            for search, draft in zip(open_searches, measure(model, drafts), strict=True):
                search.learn(draft, target)
            if on_progress is not None:
                on_progress(sum(search.next is None for search in searches), len(searches))
    return [search.result for search in searches]


def warn_if_missed(drafts: Sequence[Draft], target: float, remedy: str) -> None:
    """Say once how many segments miss the target, and by how much.

    Warns:
        QualityWarning: at least one does.
    """
    missed = [draft.accuracy for draft in drafts if draft.accuracy < target]
    if missed:
        warnings.warn(
            f"{len(missed)} of {len(drafts)} segments miss quality {target:g}: their accuracy is "
            f"{sum(missed) / len(missed):.4f} on average, {min(missed):.4f} at worst; {remedy}",
            QualityWarning,
            stacklevel=5,
        )
