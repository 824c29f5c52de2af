"""The KV cache of continuous batching, whose rows join and leave.

Every row fills its own entries from 0 on, whatever the positions of its tokens: positions are given with every pass,
and a mask hides entries that a row has not filled. So a row joins by copying it alone, and leaves without moving
others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from nugget2d.inference.prefix import attention_for
from nugget2d.modeling.cache import cached_states
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.headwise import HeadwiseCache
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role


class BatchCache(DynamicCache):
    """B rows of keys and values in buffers with room for more rows and longer ones, written in place.

    A forward pass of q inputs a row writes each row's new states after those it has; `lengths` counts them only when
    the pass is over, for all layers write at the same place.

    Attributes:
        lengths: entries filled, of each row.
    """

    def __init__(self) -> None:
        """Empty."""
        super().__init__()
        self.lengths: list[int] = []
        self._rows, self._capacity = 1, 0
        self._needs: list[int] = []  # capacity that each row was added for
        self._buffers: list[tuple[Tensor, Tensor]] = []  # of each layer: (rows, kv_heads, capacity, head_dim)

    def add(self, keys: Sequence[Tensor], values: Sequence[Tensor], capacity: int) -> None:
        """A new row, of states (1, kv_heads, n, head_dim) per layer (none: an empty row), with room for `capacity`."""
        self._make_room(capacity)
        row, length = len(self.lengths), keys[0].shape[2] if keys else 0
        for layer, states in enumerate(zip(keys, values, strict=True)):
            for buffer, new in zip(self._buffer(layer, *states), states, strict=True):
                buffer[row, :, :length] = new[0]
        self.lengths.append(length)
        self._needs.append(capacity)

    def row(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and the values of a row, as `add` takes them."""
        own = slice(index, index + 1), slice(None), slice(self.lengths[index])
        return [keys[own] for keys, _ in self._buffers], [values[own] for _, values in self._buffers]

    def drop(self, index: int) -> None:
        """Forget a row; the last one takes its place."""
        width, length, need = self.get_seq_length(), self.lengths.pop(), self._needs.pop()
        last = len(self.lengths)
        for buffer in (buffer for buffers in self._buffers for buffer in buffers):
            buffer[index, :, :width] = buffer[last, :, :width]  # what its own row left behind it, too
            buffer[last, :, :width] = 0
        if index < last:
            self.lengths[index], self._needs[index] = length, need
        if not self.lengths:  # one long request must not hold its memory for ever
            self._buffers, self._rows, self._capacity = [], 1, 0

    def advance(self, queries: int) -> None:
        """From now on what a pass of `queries` inputs has written counts."""
        self.lengths = [length + queries for length in self.lengths]

    def mask(self, queries: int, like: Tensor) -> Tensor:
        """(B, 1, q, width) additive mask: an input sees what its row has filled, and the inputs up to itself."""
        filled = torch.tensor(self.lengths, device=like.device)[:, None, None]
        last = filled + torch.arange(queries, device=like.device)[:, None]
        hidden = torch.arange(self.get_seq_length() + queries, device=like.device) > last
        return like.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(like.dtype).min)[:, None]

    # ---- what transformers calls ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Entries of the longest row."""
        return max(self.lengths, default=0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (B, kv_heads, q, head_dim) after each row's entries; return views of all rows, up to the longest."""
        batch, _, queries, _ = key_states.shape
        width = self.get_seq_length() + queries
        device = key_states.device
        rows = torch.arange(batch, device=device)[:, None]
        entries = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(queries, device=device)
        keys, values = self._buffer(layer_idx, key_states, value_states)
        keys[rows, :, entries] = key_states.transpose(1, 2)
        values[rows, :, entries] = value_states.transpose(1, 2)
        return keys[:batch, :, :width], values[:batch, :, :width]

    # ---- buffers ----

    def _buffer(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer; layers come in order the first time."""
        if layer == len(self._buffers):
            self._buffers.append((self._empty(keys), self._empty(values)))
        return self._buffers[layer]

    def _empty(self, like: Tensor) -> Tensor:
        # zeros, here and behind every row: what is masked takes part in a sum, with weight 0, and 0 x NaN is NaN
        return like.new_zeros(self._rows, like.shape[1], self._capacity, like.shape[3])

    def _make_room(self, capacity: int) -> None:
        """Room for one row more, and so many entries in every row."""
        count, width = len(self.lengths), self.get_seq_length()
        longest = max([*self._needs, capacity])
        # nor must one long request, once it has left, hold its memory as long as others come and go
        if count < self._rows and longest <= self._capacity <= 2 * longest:
            return
        self._rows = self._rows if count < self._rows else 2 * self._rows
        self._capacity = longest
        old, self._buffers = self._buffers, []
        for layer, buffers in enumerate(old):
            for new, states in zip(self._buffer(layer, *buffers), buffers, strict=True):
                new[:count, :, :width] = states[:count, :, :width]


RowCache = BatchCache | HeadwiseCache


def row_cache(cache: Cache, room: int) -> RowCache:
    """One row with the states of `cache`, and room for more; as it is where its heads differ in length."""
    if isinstance(cache, HeadwiseCache):
        return cache
    # memories that are read as text or embeddings leave it empty
    keys, values = cached_states(cache) if cache.get_seq_length() else ([], [])
    row = BatchCache()
    row.add(keys, values, cache.get_seq_length() + room)
    return row


def read(model: Network, role: Role, cache: RowCache, embeds: Tensor, positions: Sequence[int]) -> Tensor:
    """(B, V) what comes after inputs (B, q, d), each row's first at its own position; `cache` keeps their states.

    Args:
        model: the reader.
        role: with which weights: "base" reads text alone, "decoder" what follows a memory.
        cache: of B rows, with room for q more.
        embeds: the inputs.
        positions: of each row's first input.
    """
    queries = embeds.shape[1]
    first = torch.tensor(positions, device=embeds.device)[:, None]
    mask = cache.mask(queries, model.mask_like(embeds)) if isinstance(cache, BatchCache) else None
    with model.parameters_by_role.role(role) as lm, attention_for(lm, cache):
        logits = lm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=first + torch.arange(queries, device=embeds.device),
            **as_cache(lm, cache),
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    if isinstance(cache, BatchCache):
        cache.advance(queries)
    return logits
