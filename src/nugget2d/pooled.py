"""Mean pooling: the memory is the mean of the keys and values of each stretch of the text.

The simplest memory with as many entries as nuggets ("Simple Context Compression", arXiv 2510.20797, pools last hidden
states; here the keys and values of every layer are pooled, so that both kinds of memory are read in the same way).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from nugget2d.config import MemoryKind, SelectionName
from nugget2d.model import Nugget2D
from nugget2d.modeling.cache import Nuggets, cached_states
from nugget2d.modeling.network import Encoded
from nugget2d.modeling.selection import select


class PooledMemory(Nugget2D):
    """k stretches of nearly equal length tile the text, each becomes one key and one value a layer.

    Keys are moved to the position of their stretch's last token before the mean, so that a pooled key has ONE position.
    All tokens are pooled, so all get the flag (it carries no information, but initializations that use it still work).
    """

    memory_kind: ClassVar[MemoryKind] = "pooled"

    def encode(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        selection: SelectionName | None = None,
        generator: torch.Generator | None = None,
        scores: Tensor | None = None,
    ) -> Encoded:
        """See `Network.encode`; stretches are the same whatever `selection` says, `index` are their last tokens."""
        index, valid = select("even", ids, lengths, counts)
        embeds = self.embed(ids)
        if self.flag is not None:
            embeds = embeds + self.flag.to(embeds.dtype)
        keys, values = cached_states(self.encoder_states(embeds))
        inside = stretches(index, valid, ids.shape[1])
        shift = (inside * (index[..., None] - torch.arange(ids.shape[1], device=ids.device))).sum(1)
        weights = inside / inside.sum(-1, keepdim=True).clamp(min=1)

        def pool(states: Tensor) -> Tensor:
            return torch.einsum("bkn,bhnc->bhkc", weights.to(states.dtype), states)

        nuggets = Nuggets(
            [pool(states) for states in self.rotation(keys, shift)],
            [pool(states) for states in values],
            None if bool(valid.all()) else valid,
        )
        return Encoded(nuggets, index, valid)


def stretches(index: Tensor, valid: Tensor, length: int) -> Tensor:
    """(B, K) last tokens, left-padded -> (B, K, length) bool: which tokens belong to which stretch."""
    ends = index.masked_fill(~valid, -1)
    starts = torch.cat([torch.full_like(ends[:, :1], -1), ends[:, :-1]], dim=1)
    tokens = torch.arange(length, device=index.device)
    return (tokens > starts[..., None]) & (tokens <= ends[..., None])
