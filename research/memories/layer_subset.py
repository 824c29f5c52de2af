"""Layer subset: nuggets with the states of some layers only.

Tells what each layer of a nugget is worth; at equal bytes such a memory could have more nuggets.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nugget2d.config import NuggetConfig, SelectionName
from nugget2d.errors import ModelError
from nugget2d.model import Nugget2D
from nugget2d.modeling.network import Encoded
from nugget2d.training.corpus import Pack
from nugget2d.training.plugins import Plugin
from research.memories.unsaved import UnsavedMemory


class LayerSubsetMemory(UnsavedMemory):
    """Keys and values of the layers that are left out are zero.

    A transformers mask is the same for all layers, so zeroed nuggets are still attended to there, with a logit of zero;
    nothing of the text gets through.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: NuggetConfig) -> None:
        """Keep all layers, until `keep` says otherwise."""
        super().__init__(lm, tokenizer, config)
        self.layers = frozenset(range(lm.config.num_hidden_layers))

    def keep(self, layers: Sequence[int]) -> None:
        """Keep `layers` only, counted from 0.

        Raises:
            ModelError: the model has no such layer.
        """
        depth = self.lm.config.num_hidden_layers
        if not layers or not all(0 <= layer < depth for layer in layers):
            raise ModelError(f"`layers` is {list(layers)}, but the model has layers 0 to {depth - 1}; correct it")
        self.layers = frozenset(layers)

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
        """See `Network.encode`."""
        encoded = super().encode(ids, lengths, counts, selection=selection, generator=generator, scores=scores)
        nuggets = encoded.nuggets
        kept = replace(nuggets, keys=self._kept(nuggets.keys), values=self._kept(nuggets.values))
        return replace(encoded, nuggets=kept)

    def _kept(self, states: Sequence[Tensor]) -> list[Tensor]:
        return [one if layer in self.layers else torch.zeros_like(one) for layer, one in enumerate(states)]


class LayerSubset(Plugin):
    """Trains `LayerSubsetMemory`.

    Attributes:
        layers: those to keep, counted from 0.
    """

    memory: ClassVar[type[Nugget2D] | None] = LayerSubsetMemory
    layers: tuple[int, ...] = Field(min_length=1)

    def prepare(self, model: Nugget2D, text: Pack) -> Nugget2D:
        """Keep `layers` only."""
        cast(LayerSubsetMemory, model).keep(self.layers)
        return model
