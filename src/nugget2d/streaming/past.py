"""The compressed part of a stream: segments as nuggets, and the positions at which the decoder reads them."""

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
from nugget2d.streaming.eviction import evict
from nugget2d.text.segmentation import TextSegment, spans_of


@dataclass(frozen=True)
class Past:
    """Consecutive segments, oldest first, each a memory of its own: states are shared with older `Past`s, not copied.

    Attributes:
        memories: of one segment each.
        tokens: all tokens that have left the window.
        given: all nuggets that were made of them, evicted ones included.
    """

    memories: tuple[Memory, ...] = ()
    tokens: int = 0
    given: int = 0

    @staticmethod
    def of(model: Network, memory: Memory) -> "Past":
        """The segments of `memory`, in the precision of the segments that will follow."""
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
            # the last token is always a nugget; the others above the threshold are the `count` - 1 best
            scores = model.token_scores(torch.tensor([ids], device=model.device))[0, :-1]
            selection, count = "learned", 1 + int((scores > rule.value).sum())
        else:
            count = next_count(self.tokens, self.given, len(ids), rule)
        options = NuggetMethod(selection=selection).bound(model)
        result = encode(model, [_as_segment(model, ids)], [count], options)[0]
        longer = Past((*self.memories, result.memory), self.tokens + len(ids), self.given + result.count)
        return longer.within(most)

    def within(self, most: int | None) -> "Past":
        """This past with at most so many nuggets (eviction.py); None keeps all."""
        return self if most is None else replace(self, memories=evict(self.memories, most))

    def memory(self) -> Memory:
        """All segments as one memory."""
        return Memory.join(self.memories)

    def nuggets(self, model: Network, memory_length: int) -> Nuggets | None:
        """The nuggets that the decoder reads at positions 0 .. `memory_length` - 1.

        A nugget keeps the distance that its token had to the end of the compressed text. Nuggets that would get a
        negative position are not read: the model was not trained on such distances.
        """
        read: list[Memory] = []
        covered = 0  # tokens of the memories in `read`
        for memory in reversed(self.memories):
            if covered >= memory_length:
                break
            read.insert(0, memory)
            covered += memory.num_tokens
        if not read:
            return None
        joined = Memory.join(read)
        shift = memory_length - covered
        first = int((torch.tensor(joined.positions) + shift < 0).sum())
        return placed_nuggets(model, joined.kv, joined.offsets[first:] + shift, first)


def _as_segment(model: Network, ids: Sequence[int]) -> TextSegment:
    """`ids` as a text of its own."""
    text, offsets = spans_of(model.text, ids)
    return TextSegment(text, 0, list(ids), offsets)
