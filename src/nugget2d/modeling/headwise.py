"""A KV cache without padding whose length differs by layer and KV head.

Its layers hold blocks (headwise_layer.py), which a model reads with a dedicated attention function
(headwise_attention.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from transformers import Cache

from nugget2d.errors import InputError
from nugget2d.modeling.headwise_layer import Heads, HeadwiseLayer


@dataclass(frozen=True, eq=False)
class HeadwiseStates:
    """Keys and values of one row of a batch; k may differ by layer and KV head, and be 0.

    Attributes:
        keys: `keys[layer][head]` is (k, head_dim), rotated.
        values: the same shapes, but for a head_dim that may differ.
    """

    keys: Sequence[Heads]
    values: Sequence[Heads]


class HeadwiseCache(Cache):
    """Rows of keys and values, each with its own length for every layer and KV head.

    Read within `headwise_attention(lm)`, under `torch.no_grad()`: states are written in place. Every pass needs
    `position_ids`: to transformers this cache has as many tokens as were read since it was made, the memory not among
    them. So an attention mask, if there is one, is as long as what was read, and all ones.
    """

    def __init__(self, rows: Sequence[HeadwiseStates] = (), room: int = 0) -> None:
        """See `add`."""
        super().__init__(layers=[])
        self.add(rows, room)

    def add(self, rows: Sequence[HeadwiseStates], room: int = 0) -> None:
        """More rows at the end of the batch; those of one call that have the same lengths are read together.

        Args:
            rows: copied.
            room: tokens that will be read after them. More may be; it costs a copy every now and then.

        Raises:
            InputError: not all rows have the same layers and KV heads.
        """
        shapes = {tuple(len(heads) for heads in row.keys) for row in rows}
        if self.layers:
            shapes.add(tuple(layer.heads for layer in self._layers))
        if len(shapes) > 1:
            raise InputError(f"the rows of a cache must agree in their KV heads per layer, got {sorted(shapes)}")
        if rows and not self.layers:
            self.layers = [HeadwiseLayer(heads) for heads in shapes.pop()]
        for index, layer in enumerate(self._layers):
            layer.add([row.keys[index] for row in rows], [row.values[index] for row in rows], room)

    def row(self, index: int) -> HeadwiseStates:
        """A row as `add` takes it: views, which are right until the cache changes."""
        keys, values = zip(*(layer.row(index) for layer in self._layers), strict=True)
        return HeadwiseStates(keys, values)

    def drop(self, index: int) -> None:
        """Forget a row; the last one takes its place."""
        rows = list(range(self.batch_size))
        rows[index] = rows[-1]
        self._select(rows[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values take, room included."""
        return sum(block.nbytes for layer in self._layers for block in layer.blocks)

    @property
    def _layers(self) -> list[HeadwiseLayer]:
        return cast(list[HeadwiseLayer], self.layers)

    def _select(self, indices: list[int]) -> None:
        for layer in self._layers:
            layer.select(indices)

    # ---- what transformers' generate calls ----

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` is."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """So many copies of each row, next to each other: for beams and samples."""
        self._select([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._select(indices.tolist())
