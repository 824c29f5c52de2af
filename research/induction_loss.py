"""The induction-head loss: teaches a layer without positions to find earlier occurrences of the current token.

An induction head (arXiv 2209.11895): the query encodes the token that is read, the key of an uncompressed token the one
BEFORE it. A nugget stands for several tokens, so its heads share them out: the key of head h encodes the token h + 1
places before the nugget, its value the one h places before it (as in nugget2d.modeling.readout). Where no key matches,
attention goes to the sink: the start token or soft prompt that a text begins with. Plain language modelling finds none
of this on its own in the few million tokens of a small model (LOG.md). A second loss, value matching, makes the values
of nuggets what those of uncompressed tokens are.
"""

from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nugget2d.errors import ModelError
from nugget2d.model import Nugget2D
from nugget2d.modeling.hooks import find_layers, inputs_of
from nugget2d.modeling.network import Encoded, Network
from nugget2d.modeling.readout import unrotated_layers
from nugget2d.streaming.layout import Keys, Layout, Queries, joined
from nugget2d.streaming.parallel import parted
from nugget2d.training.plugins import AuxiliaryLoss, MicroBatch
from nugget2d.training.recipe import Objective

QUERIES = 256  # of each text: enough to learn from, and the loss stays cheap beside the pass itself


class InductionLoss(AuxiliaryLoss):
    """Both losses beside plain language modelling and streams.

    Attributes:
        weight: at the start of the run; it falls to a fifth at the end.
        value_matching_from: the part of the run (0 to 1) from which on values are matched: uncompressed tokens must
            first learn theirs.
    """

    objectives: ClassVar[tuple[Objective, ...]] = ("lm", "stream")
    value_matching_from: float = Field(default=0.6, ge=0, le=1)

    def weight_at(self, progress: float) -> float:
        """Falls linearly."""
        return self.weight * (1 - 0.8 * progress)

    def watch(self, model: Nugget2D) -> AbstractContextManager[list[Tensor]]:
        """The inputs of the layer's key projection."""
        return inputs_of(induction_keys(model))

    def losses(self, batch: MicroBatch, watched: list[Tensor]) -> dict[str, Tensor]:
        """The induction-head loss, and value matching where nuggets were read."""
        # the last call: before its first use, `rotation` tries the LM out; the losses call the same module themselves
        inputs = watched[-1]
        # memories of other kinds do not share out tokens over their heads
        encoded = batch.encoded if type(batch.model) is Nugget2D else None
        losses = {"induction": induction_loss(batch.model, inputs, batch.ids, batch.layout, encoded, batch.generator)}
        if encoded is not None and batch.progress >= self.value_matching_from:
            losses["value_matching"] = value_matching_loss(batch.model, inputs, batch.layout, encoded)
        return losses


def induction_layer(model: Network) -> int:
    """The number of the (first) layer without positions.

    Raises:
        ModelError: there is none.
    """
    found = unrotated_layers(model.lm)
    if not found:
        raise ModelError(
            f"InductionLoss needs a layer without positions, {model.config.name!r} has none: put "
            "research.induction:InsertLayer before it in `plugins`"
        )
    return found[0]


def induction_keys(model: Network) -> nn.Module:
    """The decoder's key projection in that layer; `induction_loss` takes its inputs."""
    return _attention(model).k_proj


def _attention(model: Network) -> Any:
    return cast(Any, find_layers(model.lm)[induction_layer(model)]).self_attn


def induction_loss(
    model: Network, inputs: Tensor, ids: Tensor, layout: Layout, encoded: Encoded | None, generator: torch.Generator
) -> Tensor:
    """Minus the log of the attention that falls where it should, in nats.

    Of three kinds: on uncompressed tokens that match, and on nuggets that do, each against all keys that do not
    (together, one would satisfy the loss for the other); where nothing matches, on the sink. Returned is the mean over
    heads and queries of each kind, then over the kinds that occur.

    Args:
        model: two copies of a Llama-shaped LM with one key-value head for each head.
        inputs: what the decoder's key projection of the layer got, reading `after_start(ids)` or in `mixed_logits`.
        ids: (B, n) the text.
        layout: how it was read; plain language modelling has one step.
        encoded: a row for each of the text's segments, if nuggets were read and their heads share out the tokens.
        generator: draws the queries.
    """
    attention, device = _attention(model), ids.device
    length = ids.shape[1]
    heads, tokens = parted(inputs, len(ids), layout) if layout.segments else (inputs[:, :-length], inputs[:, -length:])
    picked = torch.randperm(length, generator=generator)[:QUERIES].to(device)

    def by_head(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    queries = by_head(attention.q_proj(tokens[:, picked]))
    keys = by_head(attention.k_proj(torch.cat([tokens, heads], dim=1)))
    # (B, heads, keys) the token that each key is to match
    answers = F.pad(ids[:, :-1], (1, heads.shape[1]), value=-1)[:, None].expand(-1, queries.shape[1], -1)
    places, seen = layout.tokens(device)
    starts = layout.sinks(device, start=model.start_token is not None, prompts=True)[1]
    seen = joined([seen, Keys(*(field[: heads.shape[1]] for field in starts))])
    if encoded is not None:
        held = encoded.nuggets.keys[induction_layer(model)].unflatten(0, (len(ids), -1)).transpose(1, 2).flatten(2, 3)
        keys = torch.cat([keys, held.to(keys.dtype)], dim=2)
        answers = torch.cat([answers, _answers(encoded, ids, layout, queries.shape[1])], dim=2)
        seen = joined([seen, layout.nuggets(encoded.index.shape[1], device)])
    visible = seen.seen_by(Queries(*(field[picked, None] for field in places)))  # (q, keys)
    match = (answers[:, :, None] == ids[:, None, picked, None]) & visible
    logits = (queries @ keys.transpose(2, 3)).float() / attention.head_dim**0.5
    number = torch.arange(keys.shape[2], device=device)
    token, nugget = number < length, number >= length + heads.shape[1]
    others = visible & ~match
    sink = others & ~token & ~nugget & ~match.any(-1, keepdim=True)
    kinds = [(match & token, others), (match & nugget, others), (sink, others & ~sink)]
    losses = [_missed(logits, right, wrong) for right, wrong in kinds if right.any()]
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def value_matching_loss(model: Network, inputs: Tensor, layout: Layout, encoded: Encoded) -> Tensor:
    """How far the output of a nugget's head for its token is from that of all heads for the uncompressed token.

    Matches are rare, and their gradients noisy: by the induction-head loss alone the outputs of nuggets reach a third
    of the norm of those of uncompressed tokens (LOG.md). Only the encoder learns by this. Returned is the squared
    distance over the squared norm of the outputs of uncompressed tokens, both without their means: 1 if those of
    nuggets are zero.

    Args:
        model: as for `induction_loss`.
        inputs: what the decoder's key projection of the layer got in `mixed_logits`.
        layout: how the text was read, with at least one segment.
        encoded: a row for each of the text's segments.
    """
    attention, batch = _attention(model), len(encoded.index) // layout.segments
    with torch.no_grad():
        tokens = parted(inputs, batch, layout)[1][:, : layout.segments * layout.chunk]
        outputs = attention.o_proj(attention.v_proj(tokens)).reshape(-1, layout.chunk, inputs.shape[-1])
    values = encoded.nuggets.values[induction_layer(model)]  # (B * segments, heads, K, head_dim)
    output = attention.o_proj.weight.detach().unflatten(1, (-1, attention.head_dim))
    places, inside = _places(encoded, values.shape[1])
    given = torch.einsum("bhkc,dhc->bhkd", values, output.to(values.dtype))[inside].float()
    rows = torch.arange(len(places), device=places.device)[:, None, None].expand_as(places)
    wanted = outputs[rows[inside], places[inside]].float()
    given, wanted = given - given.mean(0), wanted - wanted.mean(0)
    return (given - wanted).square().sum() / wanted.square().sum()


def _places(encoded: Encoded, heads: int) -> tuple[Tensor, Tensor]:
    """(B * segments, heads, K) where in its segment the token of a head stands; and whether there is one.

    There is none beyond the nugget before.
    """
    ends = encoded.index[:, None]
    gaps = torch.diff(ends, prepend=torch.full_like(ends[..., :1], -1))
    offsets = torch.arange(heads, device=ends.device)[:, None]
    return ends - offsets, offsets < gaps


def _answers(encoded: Encoded, ids: Tensor, layout: Layout, heads: int) -> Tensor:
    """(B, heads, nuggets) the token that each head of a nugget is to match, the one before its own; -1: none.

    For a segment's first token there is none: its encoder saw nothing before.
    """
    places, inside = _places(encoded, heads)
    before = places - 1
    texts = ids[:, : layout.segments * layout.chunk].reshape(-1, layout.chunk)
    tokens = texts.gather(1, before.clamp(min=0).flatten(1)).view_as(before)
    tokens = tokens.masked_fill(~inside | (before < 0), -1)
    return tokens.unflatten(0, (len(ids), -1)).transpose(1, 2).flatten(2)


def _missed(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Mean of minus the log of the share of `right` beside `wrong`, over rows with any; (B, heads, q, keys) all."""
    lowest = torch.finfo(logits.dtype).min
    has = right.any(-1)
    logits, right, wrong = logits[has], right[has], wrong[has]
    hit, total = (logits.masked_fill(~keys, lowest).logsumexp(-1) for keys in (right, right | wrong))
    return (total - hit).mean()
