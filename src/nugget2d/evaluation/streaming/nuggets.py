"""Nuggets of older tokens and uncompressed recent ones, as `Stream` does, with all chunks computed at once.

Pooled memories (the Compressive Transformer, arXiv 1911.05507, with its mean pooling) are read in the same way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nugget2d.config import SelectionName
from nugget2d.evaluation.streaming.reader import Budget
from nugget2d.inference.placement import join_rows
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network
from nugget2d.streaming.layout import Layout
from nugget2d.streaming.parallel import mixed_logits


@dataclass(frozen=True)
class Compressed:
    """`Stream` with recent_window, chunk and max_nuggets of the budget.

    Attributes:
        model: encodes and decodes.
        budget: what a query may see.
        selection: how nuggets are chosen; None takes the model's own.
    """

    model: Network
    budget: Budget
    selection: SelectionName | None = None

    @torch.no_grad()
    def __call__(self, ids: Tensor, first: int) -> Tensor:
        """See `Reader`."""
        budget = self.budget
        layout = Layout.over(
            len(ids) - 1,
            recent_window=budget.recent_window,
            chunk=budget.chunk,
            visible_segments=budget.nuggets // budget.each,
        )
        padded = torch.nn.functional.pad(ids[:-1], (0, layout.length - len(ids) + 1))[None]
        logits = mixed_logits(self.model, self._nuggets(padded, layout), padded, layout)
        return token_losses(logits[:, first - 1 : len(ids) - 1], ids[None, first:])[0]

    def _nuggets(self, ids: Tensor, layout: Layout) -> Nuggets:
        """(1, segments * each) nuggets of all segments, keys at their positions in the text."""
        rows = ids[0, : layout.segments * layout.chunk].view(-1, layout.chunk)
        count, size = self.budget.each, len(rows)
        encoded = self.model.encode(rows, [layout.chunk] * size, [count] * size, selection=self.selection)
        return join_rows(self.model, encoded.nuggets, 1, size, layout.chunk)
