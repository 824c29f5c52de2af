"""One layer of a `HeadwiseCache`: blocks, each of the rows and KV heads that have the same number of tokens.

A uniform layer is one block; a ragged one has up to as many as it has heads, for every row whose lengths are its own.
A block has no padding, so a query sees all of it, and attention over the layer is attention over each of its blocks.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from nugget2d.errors import InputError, ModelError

# Tokens of room that a full block gets: its states are copied once for so many tokens.
_GROWTH = 128

Heads = Tensor | Sequence[Tensor]  # one tensor (k, head_dim) per KV head; (kv_heads, k, head_dim) if k is the same


class HeadwiseLayer(DynamicLayer):
    """One layer: blocks that together hold every row and KV head once.

    Attributes:
        heads: how many KV heads.
        batch_size: how many rows.
        blocks: in no order.
    """

    def __init__(self, heads: int) -> None:
        """No rows yet."""
        super().__init__()
        self.heads, self.batch_size = heads, 0
        self.blocks: list[Block] = []
        self._read = 0

    def add(self, keys: Sequence[Heads], values: Sequence[Heads], room: int) -> None:
        """See `HeadwiseCache.add`; keys and values of each row."""
        for rows, heads in _rectangles([tuple(map(len, row)) for row in keys]):
            length = len(keys[rows[0]][heads[0]])
            buffers = [
                _buffer([[row_states[row][head] for head in heads] for row in rows], length + room)
                for row_states in (keys, values)
            ]
            self.blocks.append(Block([self.batch_size + row for row in rows], heads, length, *buffers))
        self.batch_size += len(keys)

    def row(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of a row: of every head (k, head_dim)."""
        found = sorted(
            (head, block.rows.index(index), place, block)
            for block in self.blocks
            if index in block.rows
            for place, head in enumerate(block.heads)
        )
        states = [(block.keys[row, place], block.values[row, place]) for _, row, place, block in found]
        return [keys for keys, _ in states], [values for _, values in states]

    def select(self, indices: Sequence[int]) -> None:
        """Row i becomes what row `indices[i]` is."""
        self.blocks = [selected for block in self.blocks if (selected := block.select(indices))]
        self.batch_size = len(indices)

    # ---- what transformers calls ----

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, kv_heads, q, head_dim) to every block; what is returned only `headwise_attention` can read.

        Raises:
            InputError: another number of rows or heads than the cache has.
        """
        if key_states.shape[:2] != (self.batch_size, self.heads):
            raise InputError(
                f"the model reads {key_states.shape[0]} rows with {key_states.shape[1]} KV heads, but its cache has "
                f"{self.batch_size} with {self.heads}; repeat the rows of the cache as beams and samples are repeated"
            )
        for block in self.blocks:
            block.append(key_states, value_states)
        self._read += key_states.shape[2]
        states = cast(Tensor, Unpadded(self))
        return states, states

    def get_seq_length(self) -> int:
        """Tokens read since the cache was made."""
        return self._read

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last so many tokens of those that were read; the number is given as a negative one, or 0."""
        super().crop(tokens_to_remove)  # refuses positive numbers; there is nothing else in it to be cropped
        for block in self.blocks:
            block.length += tokens_to_remove
        self._read += tokens_to_remove

    def reset(self) -> None:
        """Forget every row."""
        self.select([])
        self._read = 0


class Unpadded:
    """What a layer's `update` returns in place of tensors, for `headwise_attention` to read."""

    def __init__(self, layer: HeadwiseLayer) -> None:
        """The states of `layer`."""
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        """Refuse to be taken for a tensor."""
        raise ModelError("a HeadwiseCache can only be read by the attention of `with headwise_attention(lm):`")


class Block:
    """Rows and KV heads of one layer that have the same number of tokens.

    Attributes:
        rows: which rows of the batch.
        heads: which KV heads.
        length: tokens.
        where: index of these rows and heads in any (B, kv_heads, ...) tensor; gives (rows, heads, ...).
    """

    def __init__(self, rows: Sequence[int], heads: Sequence[int], length: int, keys: Tensor, values: Tensor) -> None:
        """Take over buffers (rows, heads, capacity, head_dim), of which `length` tokens are filled."""
        self.rows, self.heads, self.length = rows, heads, length
        self._buffers = (keys, values)
        self.where = _where(rows, heads, keys.device)

    @property
    def keys(self) -> Tensor:
        """(rows, heads, length, head_dim)."""
        return self._buffers[0][:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """(rows, heads, length, head_dim)."""
        return self._buffers[1][:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write this block's part of (B, kv_heads, q, head_dim) behind what is there."""
        end = self.length + keys.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = (_longer(self.keys, end + _GROWTH), _longer(self.values, end + _GROWTH))
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, self.length : end] = states[self.where]
        self.length = end

    def select(self, indices: Sequence[int]) -> "Block | None":
        """The block after row i of the batch has become what row `indices[i]` was; None if none of its rows is left."""
        chosen = [(row, self.rows.index(index)) for row, index in enumerate(indices) if index in self.rows]
        if not chosen:
            return None
        rows, places = zip(*chosen, strict=True)
        moved = places == tuple(range(len(self.rows)))  # as they are: nothing to copy
        return Block(rows, self.heads, self.length, *(b if moved else b[list(places)] for b in self._buffers))


def _rectangles(lengths: Sequence[tuple[int, ...]]) -> Iterator[tuple[list[int], list[int]]]:
    """The rows and heads of each block, from the lengths of all heads of each row."""
    rows_of = defaultdict(list)
    for row, of_heads in enumerate(lengths):
        rows_of[of_heads].append(row)
    for of_heads, rows in rows_of.items():
        heads_of = defaultdict(list)
        for head, length in enumerate(of_heads):
            heads_of[length].append(head)
        for heads in heads_of.values():
            yield rows, heads


def _buffer(states: Sequence[Sequence[Tensor]], capacity: int) -> Tensor:
    """(rows, heads, capacity, head_dim), at whose start are the states (k, head_dim) of rows of heads."""
    return _longer(torch.stack([torch.stack(list(heads)) for heads in states]), capacity)


def _longer(states: Tensor, capacity: int) -> Tensor:
    """A copy of (rows, heads, k, head_dim) at the start of as many tokens as `capacity` says."""
    longer = states.new_empty(*states.shape[:2], capacity, states.shape[3])
    longer[:, :, : states.shape[2]] = states
    return longer


def _where(rows: Sequence[int], heads: Sequence[int], device: torch.device) -> tuple[slice | Tensor, slice | Tensor]:
    """Slices where rows or heads follow each other, for then no copy is made."""
    first, second = (
        slice(part[0], part[0] + len(part))
        if list(part) == list(range(part[0], part[0] + len(part)))
        else torch.tensor(part, device=device)
        for part in (rows, heads)
    )
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        first = first[:, None]
    return first, second
