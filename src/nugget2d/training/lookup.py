"""The lookup loss: teaches a layer without positions to find where the current token occurred, and what came next.

An induction head (arXiv 2209.11895): the query says which token is read, the key of a whole token which token came
BEFORE it. A nugget stands for several tokens, so its heads share them out: the key of head h says which token stands
h + 1 places before the nugget, its value which one stands h places before it (as in slots.py). Where no key answers, a
head has to look at something all the same: in a stream at the head of its view, lest it say the word of a random token.
Plain language modelling finds none of this on its own in the few million tokens of a small model (docs/LOG.md).
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
from nugget2d.streaming.parallel import head_places, parted

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
    """Minus the log of the attention that falls where it should, in nats.

    For three kinds of queries: on whole tokens that answer; on nuggets that do, each beside all keys that do not
    answer (together, one would let the other do its work); and, where nothing answers, on the head of the view.
    Returned is the mean over heads and queries of each kind, then over the kinds.

    Args:
        model: two copies of a Llama-shaped LM with one key-value head for each head.
        inputs: what the decoder's key projection of the layer got, of a pass without nuggets or of `mixed_logits`.
        ids: (B, n) the text.
        layout: how it was read; plain language modelling has one view, and no heads.
        encoded: a row for each of the text's segments, if nuggets were read and their heads share out the tokens.
        generator: draws the queries.
    """
    attention, device = _attention(model), ids.device
    views, tokens = (inputs[:, :0], inputs) if layout.segments == 0 else parted(inputs, len(ids), layout)
    picked = torch.randperm(ids.shape[1], generator=generator)[:QUERIES].to(device)

    def by_head(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    queries = by_head(attention.q_proj(tokens[:, picked]))
    keys = by_head(attention.k_proj(torch.cat([views, tokens], dim=1)))
    places, seen = layout.tokens(device)
    # (B, heads, keys) the token that each key answers to
    answers = F.pad(ids[:, :-1], (views.shape[1] + 1, 0), value=-1)[:, None].expand(-1, queries.shape[1], -1)
    if layout.segments:
        seen = joined([head_places(model, layout)[1], seen])
    if encoded is not None:
        held = encoded.nuggets.keys[lookup_layer(model)].unflatten(0, (len(ids), -1)).transpose(1, 2).flatten(2, 3)
        keys = torch.cat([keys, held.to(keys.dtype)], dim=2)
        answers = torch.cat([answers, _answers(encoded, ids, layout, queries.shape[1])], dim=2)
        seen = joined([seen, layout.nuggets(encoded.index.shape[1], device)])
    visible = seen.seen_by(Queries(*(field[picked, None] for field in places)))  # (q, keys)
    match = (answers[:, :, None] == ids[:, None, picked, None]) & visible
    logits = (queries @ keys.transpose(2, 3)).float() / attention.head_dim**0.5
    number = torch.arange(keys.shape[2], device=device) - views.shape[1]
    head, nugget = number < 0, number >= ids.shape[1]
    silent = visible & head & ~match.any(-1, keepdim=True)
    others = visible & ~match
    kinds = [(match & ~nugget, others), (match & nugget, others), (silent, others & ~head)]
    losses = [_missed(logits, right, wrong) for right, wrong in kinds if right.any()]
    return torch.stack(losses).mean() if losses else logits.sum() * 0


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


def _missed(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Mean of minus the log of the share of `right` beside `wrong`, over rows with any; (B, heads, q, keys) all."""
    lowest = torch.finfo(logits.dtype).min
    has = right.any(-1)
    logits, right, wrong = logits[has], right[has], wrong[has]
    hit, total = (logits.masked_fill(~keys, lowest).logsumexp(-1) for keys in (right, right | wrong))
    return (total - hit).mean()
