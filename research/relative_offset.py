"""Relative-offset initialisation: attention heads that read at fixed distances from the first step on.

Every head of every layer is to carry the token at one distance before a nugget (nugget2d.modeling.readout). With a bias
b(0) on all keys and b(o) on a query, where b(o) holds amplitude * (cos, sin)(o * frequency), the rotary embedding makes
the attention logit a function of distance alone that peaks at o, whatever the tokens are. In the encoder, the query of
a NUGGET moves from b(0) (its own token) to the distance of its head along the direction of the nugget flag; the
decoder's queries peak at the distance of theirs from the start. Everything stays trainable.
"""

import torch
from torch import Tensor, nn

from nugget2d.errors import RecipeError
from nugget2d.model import Nugget2D
from nugget2d.modeling.hooks import inputs_of
from nugget2d.modeling.network import Network
from nugget2d.modeling.readout import head_readout
from nugget2d.modeling.selection import even_ends
from nugget2d.training.corpus import Pack
from nugget2d.training.plugins import Plugin
from nugget2d.training.recipe import CompressStage

PEAK = 40.0  # logit at the distance of a head
FLAG_SCALE = 2.0  # norm of the flag, in norms of an average embedding
GROWTH = 3.0  # output projections by encoder layer are scaled by 1, 3, 9 ...: what a layer adds to has grown as much


class RelativeOffsets(Plugin):
    """A fresh compressor gets the initialisation of `set_relative_offsets`."""

    def check(self, stage: CompressStage) -> None:
        """Refuse what is already trained."""
        if stage.init is not None:
            raise RecipeError("`init` brings weights of its own: remove RelativeOffsets from `plugins`")

    def prepare(self, model: Nugget2D, text: Pack) -> Nugget2D:
        """Initialise in place, on a sample of 32 windows."""
        set_relative_offsets(model, text.spread(32, min(model.config.window, 128)).to(model.device))
        return model


@torch.no_grad()
def set_relative_offsets(model: Network, ids: Tensor) -> None:
    """Set flag, biases and the flag's effect on encoder queries.

    Args:
        model: two copies of a Llama-shaped LM with attention biases and a flag, not yet trained as a compressor.
        ids: (B, n) sample text, to measure how strongly the flag shows in the input of each layer.

    Raises:
        RecipeError: a model without biases, flag, or rotary embedding in each of two layers or more.
    """
    layout = head_readout(model)
    rotary = getattr(model.lm.base_model, "rotary_emb", None)
    if rotary is None or model.flag is None or layout.encoder[0].self_attn.q_proj.bias is None:
        raise RecipeError("RelativeOffsets needs rotary embeddings, `attention_bias: true` and the nugget flag")
    if len(layout.layers) + 1 < max(2, len(layout.decoder)):
        raise RecipeError("RelativeOffsets needs two layers or more, all of them rotary")
    frequencies: Tensor = rotary.inv_freq
    # high frequencies tell neighbours apart, low ones keep far distances from aliasing
    share = frequencies.clamp(min=0.03).sqrt()
    amplitude = (PEAK * share / share.sum() * layout.head_dim**0.5).sqrt()

    def point(distance: float) -> Tensor:
        return torch.cat([amplitude * (distance * frequencies).cos(), amplitude * (distance * frequencies).sin()])

    spread = model.embed(ids).std()
    flag = torch.randn_like(model.flag)
    model.flag.copy_(flag * FLAG_SCALE * spread)
    direction = flag / flag.norm()
    for number, (encoder, decoder) in enumerate(zip(layout.encoder, layout.decoder, strict=True)):
        attention, reader = encoder.self_attn, decoder.self_attn
        distances = layout.distances(max(number, 1))
        attention.k_proj.bias.add_(point(0).repeat(layout.heads))
        attention.q_proj.bias.add_(point(0).repeat(layout.heads))
        reader.q_proj.bias.add_(torch.cat([point(float(d)) for d in distances]))
        if number:
            attention.o_proj.weight.mul_(GROWTH**number)
    for number in range(len(layout.encoder) - 1):
        attention = layout.encoder[number].self_attn
        seen = _flag_contrast(model, attention.q_proj, direction, ids)
        for head, distance in enumerate(layout.distances(number + 1).tolist()):
            rows = slice(head * layout.head_dim, (head + 1) * layout.head_dim)
            attention.q_proj.weight[rows] += torch.outer((point(-distance) - point(0)) / seen, direction)


def _flag_contrast(model: Network, projection: nn.Module, direction: Tensor, ids: Tensor) -> Tensor:
    """How much further inputs of `projection` lie along `direction` for nuggets than for other tokens."""
    batch, length = ids.shape
    count = max(1, length // 16)
    with inputs_of(projection) as caught:
        # as nuggets, whatever memory this model makes
        Network.encode(model, ids, [length] * batch, [count] * batch, selection="even")
    along = caught[0] @ direction
    chosen = torch.zeros(length, dtype=torch.bool, device=ids.device)
    chosen[even_ends(length, count)] = True
    return along[:, chosen].mean() - along[:, ~chosen].mean()
