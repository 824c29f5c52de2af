"""The per-head token read-out of a nugget: which head of which layer carries the token at which distance.

A rotary head can attend to a nugget at one relative distance only, so the value of head h at layer l can carry one
token. Layer 0 sees only the nugget's own token; from layer 1 on, head (l, h) is to carry the token
(l - 1) * heads + h places before the nugget: L layers of H heads carry (L - 1) * H tokens. Without further losses,
training uses about one layer's worth of them (research/LOG.md, the copy-span staircase); research/readout_loss.py and
research/relative_offset.py train every layer to carry its share.

Layers without positions are not counted: their heads match tokens by content (research/induction_loss.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nugget2d.errors import ModelError
from nugget2d.modeling.hooks import find_layers
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import CopiedParameters


@dataclass(frozen=True)
class HeadReadout:
    """The layers of both copies, and which token each of their heads carries.

    Attributes:
        encoder: all its layers.
        decoder: all its layers.
        layers: numbers of those whose heads carry tokens, the nearest first.
        heads: of each layer.
        head_dim: of each head.
    """

    encoder: list[Any]
    decoder: list[Any]
    layers: list[int]
    heads: int
    head_dim: int

    def distances(self, layer: int) -> Tensor:
        """(heads,) distance that each head of `layer`, one of `layers`, carries."""
        return self.layers.index(layer) * self.heads + torch.arange(self.heads)

    def written(self, layer: int, values: Tensor) -> Tensor:
        """(..., heads, K, d): what the decoder adds to its hidden state on reading values (..., heads, K, head_dim)."""
        output = self.decoder[layer].self_attn.o_proj.weight.view(-1, self.heads, self.head_dim)
        return torch.einsum("...hkc,dhc->...hkd", values, output.to(values.dtype))


def head_readout(model: Network) -> HeadReadout:
    """The read-out of a model made of two copies of a Llama-shaped LM.

    Raises:
        ModelError: another kind of model, whose heads cannot be told apart this way.
    """
    roles = model.parameters_by_role
    config = model.lm.config
    heads = config.num_attention_heads
    if not isinstance(roles, CopiedParameters) or config.num_key_value_heads != heads:
        raise ModelError("per-head token read-out needs `adapters: copies` and one key-value head for each head")
    decoder = list(find_layers(model.lm))
    encoder = list(find_layers(model.lm, roles.encoder))
    rotated = [number for number in range(len(decoder)) if number not in unrotated_layers(model.lm)]
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return HeadReadout(encoder, decoder, rotated[1:], heads, width)


def unrotated_layers(lm: PreTrainedModel) -> list[int]:
    """Numbers of the layers without positions of a rotary LM, as SmolLM3 lists them."""
    rotated = getattr(lm.config, "no_rope_layers", None) or []  # 1 for layers that do rotate, despite the name
    return [number for number, rotates in enumerate(rotated) if not rotates]


def final_norm(lm: PreTrainedModel) -> nn.Module:
    """The norm before the head.

    Raises:
        ModelError: the LM has none under its usual name.
    """
    norm = getattr(lm.base_model, "norm", None)
    if not isinstance(norm, nn.Module):
        raise ModelError(
            f"the per-head token read-out needs a Llama-shaped base, {type(lm).__name__} has no final norm"
        )
    return norm
