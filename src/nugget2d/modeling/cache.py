"""Nuggets as a transformers KV cache: padding, masks and positions.

Positions:
- A nugget keeps the position of its token. Within a segment that is 0 .. n-1; a memory of several segments is read
  with each segment's keys rotated to where the segment stands in the text (`KeyRotation`).
- Reconstruction REWINDS: the input that predicts token t of a segment has position t, so that a token attends to the
  nugget that carries it at a small, fixed relative distance. Training converges faster than with positions after the
  text (research/LOG.md).
- Continuation starts at position n, as if the text were in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

LayerStates = Sequence[Tensor]  # one tensor (B, kv_heads, K, head_dim) per layer


@dataclass(frozen=True, eq=False)
class Nuggets:
    """A batch of memories as tensors, LEFT-padded to K nuggets with zeros.

    Attributes:
        keys: per layer (B, kv_heads, K, head_dim), rotated; carries gradient in training.
        values: the same shape.
        valid: (B, K) bool, False on the padding; None when nothing is padded.
        bias: (B, K) float or None: s - stop_gradient(s), the straight-through term of the scorer.
    """

    keys: LayerStates
    values: LayerStates
    valid: Tensor | None = None
    bias: Tensor | None = None

    @property
    def count(self) -> int:
        """K."""
        return self.keys[0].shape[2]

    def to_cache(self, config: PreTrainedConfig) -> DynamicCache:
        """A new cache: forward passes append to it, so every reading needs its own."""
        cache = DynamicCache(config=config)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)
        return cache


class AllCollected(Exception):
    """The cache has the keys and values of the last layer that is needed: the rest of the pass is skipped."""


class CollectingCache(DynamicCache):
    """A cache for the encoder, whose pass ends with the keys and values of the last layer.

    Nothing uses that layer's attention and feed-forward block. The pass ends by raising `AllCollected`.
    """

    def __init__(self, config: PreTrainedConfig, layers: int | None = None) -> None:
        """Empty; the pass ends with the first so many layers, if that is given."""
        super().__init__(config=config)
        self._wanted = len(self.layers) if layers is None else layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what a layer computed; see `DynamicCache.update`."""
        kept = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._wanted - 1:
            raise AllCollected
        return kept


def gather_nuggets(cache: DynamicCache, index: Tensor, valid: Tensor, bias: Tensor | None = None) -> Nuggets:
    """The states of the tokens at `index` (B, K) at every layer of `cache`; padding becomes zero."""
    full = bool(valid.all())
    rows = torch.arange(len(index), device=index.device)[:, None]

    def pick(states: Tensor) -> Tensor:
        # indexing, not `gather`, which would keep all of `states` for its backward pass
        picked = states[rows, :, index].transpose(1, 2).contiguous()
        return picked if full else picked * valid[:, None, :, None].to(picked.dtype)

    keys, values = cached_states(cache)
    return Nuggets(list(map(pick, keys)), list(map(pick, values)), None if full else valid, bias)


def cached_states(cache: Cache) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer of a filled cache of full-attention layers."""
    layers = [cast(DynamicLayer, layer) for layer in cache.layers]
    return [cast(Tensor, layer.keys) for layer in layers], [cast(Tensor, layer.values) for layer in layers]


def reading_mask(nuggets: Nuggets, batch: int, queries: int, like: Tensor) -> Tensor | None:
    """The attention mask of `queries` new tokens over [nuggets, new tokens]; None when nothing is masked.

    Without bias a 2D mask (B, K + queries) of ones and zeros. With bias a 4D ADDITIVE FLOAT mask
    (B, 1, queries, K + queries): the form through which a gradient reaches the scorer without changes to model
    code, and that both sdpa and eager attention apply correctly.
    """
    if nuggets.valid is None and nuggets.bias is None:
        return None
    count, device = nuggets.count, like.device
    valid = torch.ones(batch, count, dtype=torch.bool, device=device) if nuggets.valid is None else nuggets.valid
    if nuggets.bias is None:
        return torch.cat([valid, valid.new_ones(batch, queries)], dim=1).long()
    lowest = torch.finfo(like.dtype).min
    memory = nuggets.bias.to(like.dtype).masked_fill(~valid, lowest)
    causal = torch.full((queries, queries), lowest, dtype=like.dtype, device=device).triu(1)
    return torch.cat([memory[:, None, None, :].expand(-1, 1, queries, -1), causal.expand(batch, 1, -1, -1)], dim=3)
