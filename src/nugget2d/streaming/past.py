"""What has left the window: segments of the stream as nuggets, and where the decoder reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nugget2d.config import Threshold
from nugget2d.inference.placement import placed_nuggets
from nugget2d.memory.memory import Memory
from nugget2d.methods.base import native_dtype
from nugget2d.methods.nugget.encoding import encode
from nugget2d.methods.nugget.method import NuggetMethod
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.network import Network
from nugget2d.modeling.selection import next_count
from nugget2d.streaming.thinning import thin
from nugget2d.text.segmentation import TextSegment, spans_of


@dataclass(frozen=True)
class Past:
    """Consecutive segments, oldest first, each a memory of its own: states shared with older `Past`s, never copied.

    Attributes:
        memories: of one segment each.
        tokens: all tokens that ever left the window.
        given: all nuggets that were ever made of them.
    """

    memories: tuple[Memory, ...] = ()
    tokens: int = 0
    given: int = 0

    @staticmethod
    def of(model: Network, memory: Memory) -> "Past":
        """The past that `memory` stands for, in the precision of the segments that will follow."""
        memory = replace(memory, exact=None).to(native_dtype(model))
        parts = tuple(memory.segment(number) for number in range(len(memory.segments)))
        return Past(parts, memory.num_tokens, memory.num_nuggets)

    @property
    def num_nuggets(self) -> int:
        """Nuggets held."""
        return sum(memory.num_nuggets for memory in self.memories)

    @torch.no_grad()
    def add(self, model: Network, ids: Sequence[int], rule: float | Threshold, most: int | None) -> "Past":
        """This past and one more segment, its nuggets by ratio or by score; at most `most` are kept in all."""
        selection = model.config.selection
        if isinstance(rule, Threshold):
            # of the last token, always a nugget, the score does not matter: the best so many are those above
            scores = model.token_scores(torch.tensor([ids], device=model.device))[0, :-1]
            selection, count = "learned", 1 + int((scores > rule.value).sum())
        else:
            count = next_count(self.tokens, self.given, len(ids), rule)
        options = NuggetMethod(selection=selection).bound(model)
        result = encode(model, [_as_segment(model, ids)], [count], options)[0]
        longer = Past((*self.memories, result.memory), self.tokens + len(ids), self.given + result.count)
        return longer.within(most)

    def within(self, most: int | None) -> "Past":
        """This past with at most so many nuggets (thinning.py); None keeps all."""
        return self if most is None else replace(self, memories=thin(self.memories, most))

    def memory(self) -> Memory:
        """All segments as one memory."""
        return Memory.join(self.memories)

    def nuggets(self, model: Network, border: int) -> Nuggets | None:
        """The nuggets that the decoder reads, as if the text ended before position `border`.

        Every nugget stands as far from the border as its token did. Those that would stand before position 0 are not
        read: the model was not trained to look back so far.
        """
        read: list[Memory] = []
        reach = 0
        for memory in reversed(self.memories):
            if reach >= border:
                break
            read.insert(0, memory)
            reach += memory.num_tokens
        if not read:
            return None
        joined = Memory.join(read)
        first = int((torch.tensor(joined.positions) + border - reach < 0).sum())
        return placed_nuggets(model, joined.kv, joined.offsets[first:] + border - reach, first)


def _as_segment(model: Network, ids: Sequence[int]) -> TextSegment:
    """`ids` as a text of its own."""
    text, offsets = spans_of(model.text, ids)
    return TextSegment(text, 0, list(ids), offsets)
