"""A trained compressor gets one more layer, without positions, of induction heads.

It stands behind the first layer, where a nugget's hidden state holds the tokens before it, one for each head of the
next layer (nugget2d.modeling.readout): each is a code of its token, and these codes are what the new layer matches and
reads. In the encoder, head h takes code h + 1 as its key and code h as its value; in the decoder, the query is the code
of the token being read, the key of an uncompressed token the code of the token before it, the value that of its own,
each fitted by ridge regression from the hidden state. A query without a match attends to the start token or soft prompt
that a text begins with (an attention sink, arXiv 2309.17453), by one dimension of each head. The encoder computes as
before; the decoder nearly.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from nugget2d.errors import RecipeError
from nugget2d.inference.placement import join_rows
from nugget2d.model import Nugget2D
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.hooks import inputs_of
from nugget2d.modeling.network import Network
from nugget2d.modeling.readout import HeadReadout, final_norm, head_readout
from nugget2d.streaming.layout import Layout
from nugget2d.streaming.parallel import mixed_logits, parted
from nugget2d.training.corpus import Pack
from nugget2d.training.plugins import Plugin
from nugget2d.training.recipe import CompressStage

PLACE = 1  # the new layer's number
SCALE = 9.0  # norm of queries and keys: a match is worth some 14 nats of attention, other tokens are off by 2
SINK = 8.0  # nats of attention for the sink: more than for the best of some hundred tokens that do not match
GAIN = 1.0  # nats that the token behind a match gains at first
RIDGE = 20.0
WINDOWS, LAYOUT = 256, Layout(recent_window=8, chunk=20, steps=6)  # of sample text; and as many of tokens drawn evenly
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings"),
)


class InsertLayer(Plugin):
    """`insert_layer` before the first step."""

    def check(self, stage: CompressStage) -> None:
        """Refuse to start from scratch."""
        if stage.init is None:
            raise RecipeError("InsertLayer extends a trained compressor: give `init`")

    def prepare(self, model: Nugget2D, text: Pack) -> Nugget2D:
        """The model with the new layer."""
        return insert_layer(model, text)


@torch.no_grad()
def insert_layer(model: Nugget2D, text: Pack) -> Nugget2D:
    """`model` with a new layer in both copies; its base is then a SmolLM3, a Llama that need not rotate in all layers.

    Args:
        model: two copies of a Llama trained with the read-out loss.
        text: to fit the new weights to.

    Raises:
        RecipeError: another kind of model.
    """
    if (
        not isinstance(model.lm, LlamaForCausalLM)
        or not model.config.token_readout
        or not model.lm.config.attention_bias
    ):
        raise RecipeError("InsertLayer needs a Llama with attention biases, trained with ReadoutLoss")
    layout = head_readout(model)
    if layout.heads * layout.head_dim != model.lm.config.hidden_size or layout.layers[:1] != [PLACE]:
        raise RecipeError("InsertLayer needs heads that share out the hidden size, and at least two layers")
    extended = _with_room(model)
    layers = head_readout(extended)
    encoder, decoder = layers.encoder[PLACE], layers.decoder[PLACE]
    ids = text.spread(WINDOWS, LAYOUT.length).to(model.device)
    codes = _codes(model, layout, ids)
    keys = [code.whitened(SCALE) for code in codes[1:]]  # of all heads but the last, which has no code to its left
    _fit_encoder(encoder, layout.encoder[PLACE], codes, keys)
    _fit_decoder(extended, decoder, layout, ids, codes, keys)
    return extended.eval()


def _with_room(model: Nugget2D) -> Nugget2D:
    """The same weights, and a new layer that adds nothing."""
    old = model.lm.config
    count = old.num_hidden_layers + 1
    config = SmolLM3Config(
        **{name: getattr(old, name) for name in SHARED},
        num_hidden_layers=count,
        no_rope_layers=[int(number != PLACE) for number in range(count)],
    )
    lm = SmolLM3ForCausalLM(config)
    nn.Module.to(lm, model.device, model.lm.dtype)
    lm.set_attn_implementation(model.lm.config._attn_implementation)
    extended = type(model)(lm, model.tokenizer, model.config).to(model.device)
    missing = extended.load_state_dict({_moved(name): one for name, one in model.state_dict().items()}, strict=False)
    layout = head_readout(extended)
    for layer in (layout.encoder[PLACE], layout.decoder[PLACE]):
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    if missing.unexpected_keys or any(f".layers.{PLACE}." not in name for name in missing.missing_keys):
        raise RecipeError(f"InsertLayer found weights that it does not know: {missing.unexpected_keys[:3]}")
    return extended


def _moved(name: str) -> str:
    """The name of a weight once there is a layer number `PLACE` more."""

    def number(found: re.Match[str]) -> str:
        index = int(found[1])
        return f".layers.{index + (index >= PLACE)}."

    return re.sub(r"\.layers\.(\d+)\.", number, name)


@dataclass(frozen=True)
class _Code:
    """What a head holds for each token: table (V, head_dim), centred; `mean` is what was taken off."""

    table: Tensor
    mean: Tensor
    spread: Tensor  # covariance over the sample

    def whitened(self, scale: float) -> tuple[Tensor, Tensor]:
        """(head_dim, head_dim) that makes its dimensions alike, and the table so, of mean norm `scale`.

        The last dimension is left empty: of the directions that tell tokens apart, the one that does so least is gone.
        """
        inverse = torch.linalg.inv(torch.linalg.cholesky(self.spread)).T
        best = torch.linalg.svd(self.table @ inverse, full_matrices=False).Vh
        best[-1] = 0
        inverse = inverse @ best.T
        table = self.table @ inverse
        factor = scale / table.norm(dim=1).mean()
        return inverse * factor, table * factor


def _codes(model: Nugget2D, layout: HeadReadout, ids: Tensor) -> list[_Code]:
    """The codes of the heads of layer `PLACE`, as linear functions of embeddings."""
    vocabulary = torch.arange(len(model.tokenizer), device=ids.device)
    generator = torch.Generator().manual_seed(0)
    even = torch.randint(len(vocabulary), ids.shape, generator=generator).to(ids.device)  # rare tokens too
    texts = torch.cat([ids, even])
    batch, length = texts.shape
    # as nuggets, whatever memory this model makes
    encoded = Network.encode(model, texts, [length] * batch, [length // layout.heads] * batch, selection="even")
    embeddings = _with_one(layout.encoder[0].input_layernorm(model.embed(vocabulary)))
    codes = []
    for head, values in enumerate(encoded.nuggets.values[PLACE].unbind(1)):
        inside = encoded.index >= head
        tokens = texts.gather(1, (encoded.index - head).clamp(min=0))[inside]
        table = embeddings @ _ridge(embeddings[tokens], values[inside].double())
        mean = table[tokens].mean(0)
        off = values[inside].double() - mean
        codes.append(_Code(table - mean, mean, off.T @ off / len(off)))
    return codes


def _fit_encoder(new: Any, old: Any, codes: list[_Code], keys: list[tuple[Tensor, Tensor]]) -> None:
    new.input_layernorm.load_state_dict(old.input_layernorm.state_dict())
    weights, bias = _by_head(old.self_attn.v_proj, len(codes))
    means = torch.stack([code.mean for code in codes])
    _set_heads(new.self_attn.v_proj, list(weights), list(bias - means))
    turned = [
        (whiten.T @ weight, whiten.T @ (shift - mean))
        for (whiten, _), weight, shift, mean in zip(keys, weights[1:], bias[1:], means[1:], strict=True)
    ]
    _set_heads(new.self_attn.k_proj, *map(list, zip(*turned, strict=True)))


def _fit_decoder(
    model: Nugget2D,
    new: Any,
    layout: HeadReadout,
    ids: Tensor,
    codes: list[_Code],
    keys: list[tuple[Tensor, Tensor]],
) -> None:
    final: Any = final_norm(model.lm)
    with inputs_of(new.self_attn.k_proj) as read, inputs_of(final) as last:
        mixed_logits(model, _nuggets(model, ids), ids, LAYOUT)
    heads, tokens = parted(read[-1], len(ids), LAYOUT)
    heads = heads[:, int(model.start_token is None) :]  # without a start token view 0 has no sink
    own, before = ids[:, 1:].flatten(), ids[:, :-1].flatten()
    states = _with_one(torch.cat([tokens[:, 1:].flatten(0, 1), heads.flatten(0, 1)]))
    sink = (SINK * layout.head_dim**0.5) ** 0.5  # what the empty dimension of a query and of a head's key is
    # of tokens, and what their last dimension and that of heads gets
    parts = {
        new.self_attn.q_proj: ([table[own] for _, table in keys], sink, sink),
        new.self_attn.k_proj: ([table[before] for _, table in keys], 0.0, sink),
        # uncompressed tokens are read by all heads, a token of a nugget by one
        new.self_attn.v_proj: ([code.table[own] / layout.heads for code in codes], 0.0, 0.0),
    }
    for projection, (wanted, of_tokens, of_heads) in parts.items():
        rows = states.new_zeros(len(states), layout.head_dim)
        rows[: len(own), -1], rows[len(own) :, -1] = of_tokens, of_heads
        fitted = [_ridge(states, rows + F.pad(one, (0, 0, 0, len(rows) - len(one)))) for one in wanted]
        _set_heads(projection, [one[:-1].T for one in fitted], [one[-1] for one in fitted])
    # the next layer's output projection, which reads the same codes, by a factor that makes a match worth `GAIN`
    old = layout.decoder[PLACE].self_attn.o_proj.weight
    tables = torch.stack([code.table[own] for code in codes]).to(old.dtype)
    written = layout.written(PLACE, tables).mean(0) * final.weight  # (tokens, d)
    embeddings = model.embed(own)
    scale = parted(last[-1], len(ids), LAYOUT)[1].square().mean(-1).sqrt().mean()
    gain = (written / scale * (embeddings - embeddings.mean(0))).sum(-1).mean()
    new.self_attn.o_proj.weight.copy_(old * (GAIN / gain))


def _nuggets(model: Nugget2D, ids: Tensor) -> Nuggets:
    """Those of all segments of `LAYOUT`, whatever memory this model makes."""
    rows = ids[:, : LAYOUT.segments * LAYOUT.chunk].reshape(-1, LAYOUT.chunk)
    size = len(rows)
    encoded = Network.encode(model, rows, [LAYOUT.chunk] * size, [2] * size, selection="even")
    return join_rows(model, encoded.nuggets, len(ids), LAYOUT.segments, LAYOUT.chunk)


def _by_head(projection: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """(heads, head_dim, d) and (heads, head_dim), in double precision."""
    return projection.weight.double().unflatten(0, (heads, -1)), projection.bias.double().unflatten(0, (heads, -1))


def _set_heads(projection: nn.Linear, weights: list[Tensor], biases: list[Tensor]) -> None:
    """Set the first heads; the others match nothing."""
    weight, bias = torch.cat(weights), torch.cat(biases)
    projection.weight.zero_()
    projection.bias.zero_()
    projection.weight[: len(weight)] = weight.to(projection.weight.dtype)
    projection.bias[: len(bias)] = bias.to(projection.bias.dtype)


def _with_one(states: Tensor) -> Tensor:
    """(n, d) -> (n, d + 1), in double precision."""
    return torch.cat([states, torch.ones_like(states[:, :1])], dim=1).double()


def _ridge(inputs: Tensor, wanted: Tensor) -> Tensor:
    """(d, c) weights that make (n, c) of (n, d)."""
    square = inputs.T @ inputs
    square.diagonal().add_(RIDGE)
    return torch.linalg.solve(square, inputs.T @ wanted)
