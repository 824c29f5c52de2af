"""What a way of reading is: the losses of a block's tokens, each predicted from a bounded number of states.

All ways read on in chunks of c tokens, so that the last query of a chunk sees S states, the first c - 1 fewer. What
counts is keys: nuggets, a head, sinks, whole tokens, the query's own.
"""

from typing import Protocol

from torch import Tensor

from nugget2d.config import Frozen
from nugget2d.errors import InputError


class Budget(Frozen):
    """What a query may see, and what nuggets make of it.

    Attributes:
        states: S, the most keys that a query attends to.
        chunk: c, tokens between two slides.
        ratio: tokens of a nugget.
        share: the part of the states that are nuggets.
    """

    states: int
    chunk: int
    ratio: int
    share: float

    @property
    def nuggets(self) -> int:
        """Nuggets that a query sees."""
        return round(self.states * self.share)

    @property
    def each(self) -> int:
        """Nuggets of a chunk."""
        return self.chunk // self.ratio

    @property
    def tau(self) -> int:
        """Whole tokens behind a chunk; the head counts as a state too."""
        return self.states - self.nuggets - 1 - self.chunk

    @property
    def text(self) -> int:
        """Tokens that nuggets and whole tokens stand for together."""
        return self.nuggets * self.ratio + self.tau + self.chunk

    def check(self, window: int, context: int) -> None:
        """Refuse what a model of this `window` and `context` cannot read, or what cannot be shared out.

        Raises:
            InputError: it is one of those; the message says which.
        """
        if self.chunk % self.ratio or not self.nuggets or self.nuggets % max(1, self.each):
            raise InputError(
                f"{self.states} states, {self.nuggets} of them nuggets, in chunks of {self.chunk} tokens: at "
                f"{self.ratio}x a chunk must be whole nuggets, and the nuggets whole chunks of them; try "
                f"--chunk {2 * self.ratio} or another --share"
            )
        if self.tau < 1:
            raise InputError(f"{self.states} states leave no room for chunks of {self.chunk} tokens; ask for more")
        if self.chunk > window:
            raise InputError(f"chunks of {self.chunk} tokens are longer than the model's window of {window}")
        if self.text + 2 > context:
            raise InputError(
                f"with {self.states} states {self.ratio}x reaches back {self.text} tokens, but the model was trained "
                f"on contexts of {context}: ask for fewer --states"
            )


class Reader(Protocol):
    """A way to read."""

    def __call__(self, ids: Tensor, first: int) -> Tensor:
        """(n,) tokens that nothing comes before -> (n - first,) nats of those from `first` on.

        Those have the whole past that the budget allows.
        """
