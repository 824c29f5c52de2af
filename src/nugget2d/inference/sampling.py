"""Sampling: the next token from logits, greedy or random."""

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nugget2d.errors import InputError, ModelError

# Temperatures below it take the likeliest token: dividing by them would leave float32's range.
GREEDY_BELOW = 1e-5

NO_PROBABILITIES = (
    "the model gives no probabilities (its output is not a number): the memory it reads is damaged, or its numbers "
    "overflow; compress the text again, or use float32"
)


@dataclass(eq=False)
class Sampler:
    """Draws the tokens of one answer, from its own generator: a seed gives the same draws in any batch.

    Attributes:
        temperature: divides the logits; 0, or nearly, takes the likeliest token every time.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        seed: any integer; None draws otherwise each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Check the numbers and seed the generator.

        Raises:
            InputError: a temperature that is negative or not a number, a top_p outside (0, 1].
        """
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        seed = int.from_bytes(os.urandom(8), "little") if self.seed is None else self.seed
        self._generator = torch.Generator().manual_seed(seed % (1 << 63))  # torch takes those of 64 bits

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits (V,): a number from 0 to V - 1.

        Raises:
            ModelError: the logits are no distribution: one is NaN, or all are -inf.
        """
        logits = logits.detach().cpu().double()
        best = logits.max()  # NaN if any is
        if best.isnan() or best == -torch.inf:
            raise ModelError(NO_PROBABILITIES)
        if self.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        # the maximum becomes 0: nothing overflows, and infinite logits are equally likely
        scaled = torch.where(logits == best, 0, logits - best) / self.temperature
        probabilities, order = scaled.softmax(-1), None
        if self.top_p < 1:
            order = logits.argsort(descending=True, stable=True)  # close logits may have the same probability
            probabilities = probabilities[order]
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)  # before the likeliest there is nothing
        mass = probabilities.cumsum(-1)
        # a number in (0, 1]: 0 would point before tokens of probability 0
        point = (1 - torch.rand((), generator=self._generator)) * mass[-1]
        drawn = int(torch.searchsorted(mass, point))
        return drawn if order is None else int(order[drawn])
