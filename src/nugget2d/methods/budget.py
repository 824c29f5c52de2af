"""How much of a text a memory may keep: a ratio, a number of nuggets, or bytes."""

from dataclasses import dataclass
from math import ceil, inf

from nugget2d.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Exactly one of ratio, nuggets and nbytes; it applies to each text of a call.

    Attributes:
        ratio: tokens of the text for each token kept (n / k), at least 1.
        nuggets: tokens kept by a head, on average (k).
        nbytes: bytes of the payload, prefix included (`Memory.nbytes`), at most.
    """

    ratio: float | None = None
    nuggets: int | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: none or several are given, or one is below 1, NaN or infinite.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise InputError(
                f"a budget is one of ratio, nuggets and nbytes, got {' and '.join(given) or 'none'}; give exactly one"
            )
        for name, value in given.items():
            if not 1 <= value < inf:  # integers of any size are finite
                hint = " (1 keeps every token)" if name == "ratio" else ""
                raise InputError(f"{name} must be at least 1{hint} and finite, got {value}")

    def count(self, tokens: int, token_nbytes: float, fixed: int = 0) -> int:
        """Tokens to keep of so many, at least 1.

        Args:
            tokens: of the text (n).
            token_nbytes: bytes that a kept token takes, over all layers and heads.
            fixed: tokens of the same size that are kept as well (a prefix); they count towards `nbytes` only.

        Raises:
            InputError: `nbytes` does not hold a single token.
        """
        if self.ratio is not None:
            return max(1, ceil(tokens / self.ratio))
        if self.nuggets is not None:
            return min(tokens, self.nuggets)
        all_nbytes = ceil((tokens + fixed) * token_nbytes)
        count = int(min(self.nbytes or 0, all_nbytes) // token_nbytes) - fixed
        if count < 1:
            needed = ceil((fixed + 1) * token_nbytes)
            raise InputError(f"{self.nbytes} bytes cannot hold a memory, at least {needed:,} are needed; raise nbytes")
        return min(tokens, count)
