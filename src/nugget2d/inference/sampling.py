"""Which token comes next: the likeliest, or one drawn."""

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Sampler:
    """Draws the tokens of one request, from a generator of its own: the same seed draws the same, whoever is beside it.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token every time.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        seed: None draws otherwise each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Seed the generator."""
        seed = int.from_bytes(os.urandom(8), "little") if self.seed is None else self.seed
        # any integer is a seed; torch takes those of 64 bits
        self._generator = torch.Generator().manual_seed(seed % (1 << 63))

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits (V,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.float().cpu()
        probabilities = ((logits - logits.max()) / self.temperature).softmax(-1)  # 0 at the top: nothing overflows
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(descending=True, stable=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)  # the likeliest always stays
        mass = probabilities.cumsum(-1)
        # a number in (0, 1]: 0 would point before tokens of probability 0
        point = (1 - torch.rand((), generator=self._generator)) * mass[-1]
        drawn = int(torch.searchsorted(mass, point))
        return drawn if order is None else int(order[drawn])
