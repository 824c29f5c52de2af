"""Which token of a text a stream sees whole, which through nuggets, when: the mask of chunked mixed resolution.

View v is what a stream sees after its window has slid v times: nuggets of segments 0 .. v - 1, a head, and the whole
tokens from v * chunk on. All tokens of a chunk share a view (Nugget2D, section 3.3).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = 1 << 30  # later than any view


class Queries(NamedTuple):
    """Where inputs look from: their view, and their place in the order of the text."""

    view: Tensor
    order: Tensor


class Keys(NamedTuple):
    """Who sees an input: queries of the views `first` .. `last` whose order is not before its own."""

    first: Tensor
    last: Tensor
    order: Tensor

    def seen_by(self, queries: Queries) -> Tensor:
        """Whether `queries` see these keys; shapes broadcast."""
        return (self.first <= queries.view) & (queries.view <= self.last) & (self.order <= queries.order)


@dataclass(frozen=True)
class Layout:
    """How a text is cut.

    Attributes:
        tau: whole tokens behind a chunk.
        chunk: tokens of a chunk, and of a segment.
        views: at least 1; every view after the first has one segment more.
        reach: how many segments before its whole tokens a view sees; None shows all.
    """

    tau: int
    chunk: int
    views: int
    reach: int | None = None

    @staticmethod
    def over(length: int, *, tau: int, chunk: int, reach: int | None = None) -> "Layout":
        """The shortest layout with room for `length` tokens."""
        return Layout(tau, chunk, max(1, -(-(length - tau) // chunk)), reach)

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return self.tau + self.views * self.chunk

    @property
    def segments(self) -> int:
        """Segments that become nuggets: the last view's whole tokens do not."""
        return self.views - 1

    def tokens(self, device: torch.device) -> tuple[Queries, Keys]:
        """The tokens of the text, (n,) each."""
        index = torch.arange(self.length, device=device)
        view = (index - self.tau).div(self.chunk, rounding_mode="floor").clamp(min=0)
        return Queries(view, index + 1), Keys(torch.zeros_like(index), index // self.chunk, index + 1)

    def heads(self, device: torch.device, *, start: bool, prompts: bool) -> tuple[Queries, Keys]:
        """The heads, one a view, (views,) each; without `start` nobody sees the first, without `prompts` the others."""
        view = torch.arange(self.views, device=device)
        first = view.masked_fill((view == 0) & (not start) | (view > 0) & (not prompts), NEVER)
        return Queries(view, torch.zeros_like(view)), Keys(first, view, torch.zeros_like(view))

    def nuggets(self, count: int, device: torch.device) -> Keys:
        """The nuggets, `count` of each segment, (segments * count,) each."""
        segment = torch.arange(self.segments, device=device).repeat_interleave(count)
        last = torch.full_like(segment, NEVER) if self.reach is None else segment + self.reach
        return Keys(segment + 1, last, torch.full_like(segment, -1))


def joined(parts: list[Keys]) -> Keys:
    """Keys side by side, along the last dimension."""
    return Keys(*(torch.cat(fields, dim=-1) for fields in zip(*parts, strict=True)))
