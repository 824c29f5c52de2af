"""The attention mask of a stream over a whole text: which queries see which tokens, sinks and nuggets.

Step s is the state of a stream after its window has slid s times: the nuggets of segments 0 .. s - 1, a sink, and the
uncompressed tokens from s * chunk on. The tokens of a chunk belong to the same step (Nugget2D, section 3.3).

The sink is one input before the uncompressed tokens: the start token at step 0, the soft prompt from then on.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = 1 << 30  # later than any step


class Queries(NamedTuple):
    """Inputs as queries: their step, and their place in the order of the text."""

    step: Tensor
    order: Tensor


class Keys(NamedTuple):
    """Inputs as keys: visible to queries of the steps `first` .. `last` whose order is not before their own."""

    first: Tensor
    last: Tensor
    order: Tensor

    def seen_by(self, queries: Queries) -> Tensor:
        """Whether `queries` see these keys; shapes broadcast."""
        return (self.first <= queries.step) & (queries.step <= self.last) & (self.order <= queries.order)


@dataclass(frozen=True)
class Layout:
    """How a text is divided into an uncompressed window and segments.

    Attributes:
        recent_window: uncompressed tokens before a chunk (tau in the paper).
        chunk: tokens of a chunk, and of a segment.
        steps: at least 1; every step after the first has one segment more.
        visible_segments: how many of the last segments a step sees; None shows all.
    """

    recent_window: int
    chunk: int
    steps: int
    visible_segments: int | None = None

    @staticmethod
    def over(length: int, *, recent_window: int, chunk: int, visible_segments: int | None = None) -> "Layout":
        """The shortest layout with room for `length` tokens."""
        return Layout(recent_window, chunk, max(1, -(-(length - recent_window) // chunk)), visible_segments)

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return self.recent_window + self.steps * self.chunk

    @property
    def segments(self) -> int:
        """Segments that become nuggets; the tokens of the last step's window do not."""
        return self.steps - 1

    def tokens(self, device: torch.device) -> tuple[Queries, Keys]:
        """The tokens of the text, (n,) each."""
        index = torch.arange(self.length, device=device)
        step = (index - self.recent_window).div(self.chunk, rounding_mode="floor").clamp(min=0)
        return Queries(step, index + 1), Keys(torch.zeros_like(index), index // self.chunk, index + 1)

    def sinks(self, device: torch.device, *, start: bool, prompts: bool) -> tuple[Queries, Keys]:
        """The sinks, one per step, (steps,) each; without `start` the first is masked, without `prompts` the others."""
        step = torch.arange(self.steps, device=device)
        first = step.masked_fill((step == 0) & (not start) | (step > 0) & (not prompts), NEVER)
        return Queries(step, torch.zeros_like(step)), Keys(first, step, torch.zeros_like(step))

    def nuggets(self, count: int, device: torch.device) -> Keys:
        """The nuggets, `count` of each segment, (segments * count,) each."""
        segment = torch.arange(self.segments, device=device).repeat_interleave(count)
        last = torch.full_like(segment, NEVER) if self.visible_segments is None else segment + self.visible_segments
        return Keys(segment + 1, last, torch.full_like(segment, -1))


def joined(parts: list[Keys]) -> Keys:
    """Keys side by side, along the last dimension."""
    return Keys(*(torch.cat(fields, dim=-1) for fields in zip(*parts, strict=True)))
