"""`Reader`: a method that predicts the tokens of a block, each from a bounded number of states; and its `Budget`.

All methods read chunks of c tokens, so that the last query of a chunk sees S states, the first c - 1 fewer. All keys
count: nuggets, sinks, uncompressed tokens, the query's own.
"""

from typing import Protocol

from torch import Tensor

from nugget2d.config import Frozen
from nugget2d.errors import InputError


class Budget(Frozen):
    """The states that a query may see, and the share of nuggets.

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
    def recent_window(self) -> int:
        """Uncompressed tokens before a chunk; the sink counts as a state too."""
        return self.states - self.nuggets - 1 - self.chunk

    @property
    def text(self) -> int:
        """Tokens that nuggets and uncompressed tokens stand for together."""
        return self.nuggets * self.ratio + self.recent_window + self.chunk

    def check(self, window: int, context: int) -> None:
        """Refuse a budget that a model of this `window` and `context` cannot read, or that cannot be divided evenly.

        Raises:
            InputError: it is one of those; the message says which.
        """
        if self.chunk % self.ratio or not self.nuggets or self.nuggets % max(1, self.each):
            raise InputError(
                f"{self.states} states, {self.nuggets} of them nuggets, in chunks of {self.chunk} tokens: at "
                f"{self.ratio}x the chunk must be a multiple of {self.ratio} tokens, and the nuggets a multiple of a "
                f"chunk's; try --chunk {2 * self.ratio} or another --share"
            )
        if self.recent_window < 1:
            raise InputError(f"{self.states} states leave no room for chunks of {self.chunk} tokens; ask for more")
        if self.chunk > window:
            raise InputError(f"chunks of {self.chunk} tokens are longer than the model's window of {window}")
        if self.text + 2 > context:
            raise InputError(
                f"with {self.states} states {self.ratio}x covers {self.text} tokens, but the model was trained "
                f"on contexts of {context}: ask for fewer --states"
            )


class Reader(Protocol):
    """A method to read a block."""

    def __call__(self, ids: Tensor, first: int) -> Tensor:
        """(n,) tokens at the start of a text -> (n - first,) nats of those from `first` on.

        They have as many states before them as the budget allows.
        """
