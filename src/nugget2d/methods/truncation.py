"""Truncation: the last tokens, and the first ones as attention sinks (StreamingLLM, arXiv 2309.17453, section 3)."""

from typing import ClassVar

import torch
from pydantic import Field

from nugget2d.methods.whole_context import Context, Kept, WholeContextMethod


class Truncation(WholeContextMethod):
    """Keeps the start and the end of the context: the baseline without compression.

    Attributes:
        sinks: first tokens, those of the prefix among them, that are kept as attention sinks.
    """

    name: ClassVar[str] = "truncation"
    source: ClassVar[str] = "Xiao et al. 2024, arXiv 2309.17453"

    sinks: int = Field(default=4, ge=0)

    def select(self, context: Context, count: int) -> Kept:
        """The same tokens for all heads."""
        first = min(max(0, self.sinks - context.prefix), count - 1)
        last = context.length - (count - first)
        return torch.cat([torch.arange(first), torch.arange(last, context.length)])
