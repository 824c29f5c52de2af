"""The lookup loss: teaches a layer without positions to find where the current token occurred, and what came next.

An induction head (arXiv 2209.11895): the query says which token is read, the key of a whole token which token came
BEFORE it. A nugget stands for several tokens, so its heads share them out: the key of head h says which token stands
h + 1 places before the nugget, its value which one stands h places before it (as in slots.py). Plain language modelling
finds neither on its own in the few million tokens of a small model (docs/LOG.md).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nugget2d.errors import ModelError
from nugget2d.hidden import find_layers
from nugget2d.network import Encoded, Network
from nugget2d.slots import unrotated_layers
from nugget2d.streaming.layout import Layout, Queries, joined

QUERIES = 256  # of each text: enough to learn from, and the loss stays cheap beside the pass itself


def lookup_layer(model: Network) -> int:
    """The number of the (first) layer without positions.

    Raises:
        ModelError: there is none.
    """
    found = unrotated_layers(model.lm)
    if not found:
        raise ModelError(f"`lookup` needs a layer without positions, {model.config.name!r} has none: set `grow: true`")
    return found[0]


def lookup_keys(model: Network) -> nn.Module:
    """The decoder's key projection in that layer; `lookup_loss` takes its inputs."""
    return _attention(model).k_proj


def _attention(model: Network) -> Any:
    return cast(Any, find_layers(model.lm)[lookup_layer(model)]).self_attn


def lookup_loss(
    model: Network, inputs: Tensor, ids: Tensor, layout: Layout, encoded: Encoded | None, generator: torch.Generator
) -> Tensor:
    """Minus the log of the attention that falls on tokens behind the same token, in nats.

    Whole tokens and nuggets are two losses, each against all keys that match in neither way: one would let the other
    do its work. Returned is the mean over heads and queries that have a match, then over the two.

    Args:
        model: two copies of a Llama-shaped LM with one key-value head for each head.
        inputs: (B, n, d) what the decoder's key projection of the layer got, in the order of the text.
        ids: (B, n) the text.
        layout: how it was read; plain language modelling has one view.
        encoded: a row for each of the text's segments, if nuggets were read and their heads share out the tokens.
        generator: draws the queries.
    """
    attention = _attention(model)
    width, device = attention.head_dim, ids.device
    picked = torch.randperm(ids.shape[1], generator=generator)[:QUERIES].to(device)
    queries = attention.q_proj(inputs[:, picked]).unflatten(-1, (-1, width)).transpose(1, 2)
    keys = attention.k_proj(inputs).unflatten(-1, (-1, width)).transpose(1, 2)
    # (B, heads, keys) the token that each key answers to
    answers = F.pad(ids[:, :-1], (1, 0), value=-1)[:, None].expand(-1, queries.shape[1], -1)
    places, seen = layout.tokens(device)
    if encoded is not None:
        held = encoded.nuggets.keys[lookup_layer(model)].unflatten(0, (len(ids), -1)).transpose(1, 2).flatten(2, 3)
        keys = torch.cat([keys, held.to(keys.dtype)], dim=2)
        answers = torch.cat([answers, _answers(encoded, ids, layout, queries.shape[1])], dim=2)
        seen = joined([seen, layout.nuggets(encoded.index.shape[1], device)])
    visible = seen.seen_by(Queries(*(field[picked, None] for field in places)))  # (q, keys)
    match = (answers[:, :, None] == ids[:, None, picked, None]) & visible
    logits = (queries @ keys.transpose(2, 3)).float() / width**0.5
    whole = torch.arange(keys.shape[2], device=device) < ids.shape[1]
    kinds = [whole] if encoded is None else [whole, ~whole]
    return torch.stack([_missed(logits, match & kind, visible & ~match) for kind in kinds]).mean()


def _answers(encoded: Encoded, ids: Tensor, layout: Layout, heads: int) -> Tensor:
    """(B, heads, nuggets) the token that each head of a nugget answers to; -1 where it has none.

    A head has none beyond the nugget before, and for a segment's first token, before which its encoder saw nothing.
    """
    ends = encoded.index[:, None]  # (B * segments, 1, K)
    gaps = torch.diff(ends, prepend=torch.full_like(ends[..., :1], -1))
    offsets = torch.arange(heads, device=ids.device)[:, None]
    before = ends - offsets - 1
    texts = ids[:, : layout.segments * layout.chunk].reshape(-1, layout.chunk)
    tokens = texts.gather(1, before.clamp(min=0).flatten(1)).view_as(before)
    tokens = tokens.masked_fill((offsets >= gaps) | (before < 0), -1)
    return tokens.unflatten(0, (len(ids), -1)).transpose(1, 2).flatten(2)


def _missed(logits: Tensor, match: Tensor, others: Tensor) -> Tensor:
    """Mean of minus the log of the share of `match` beside `others`, over rows that have a match; 0 if none has.

    All (B, heads, queries, keys).
    """
    lowest = torch.finfo(logits.dtype).min
    has = match.any(-1)
    logits, match, others = logits[has], match[has], others[has]
    hit, total = (logits.masked_fill(~keys, lowest).logsumexp(-1) for keys in (match, match | others))
    return (total - hit).sum() / max(1, len(logits))
