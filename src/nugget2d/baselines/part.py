"""Part-layer memory: nuggets with the states of some layers only.

Tells what each layer of a nugget is worth; at equal bytes such a memory could have more nuggets.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nugget2d.baselines.baseline import Baseline
from nugget2d.config import MemoryKind, NuggetConfig, SelectionName
from nugget2d.errors import ModelError
from nugget2d.modeling.network import Encoded


class PartMemory(Baseline):
    """Keys and values of the layers that are left out are zero.

    A transformers mask is the same for all layers, so zeroed nuggets are still attended to there, with a logit of zero;
    nothing of the text gets through.
    """

    memory_kind: ClassVar[MemoryKind] = "part"

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
            raise ModelError(f"memory_layers is {list(layers)}, but the model has layers 0 to {depth - 1}; correct it")
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
        kept = replace(nuggets, keys=self._part(nuggets.keys), values=self._part(nuggets.values))
        return replace(encoded, nuggets=kept)

    def _part(self, states: Sequence[Tensor]) -> list[Tensor]:
        return [one if layer in self.layers else torch.zeros_like(one) for layer, one in enumerate(states)]
