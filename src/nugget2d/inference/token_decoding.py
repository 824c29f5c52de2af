"""Which tokens a memory holds, decoded from its states without running the LM (a logit lens on keys and values)."""

import torch
from torch import Tensor

from nugget2d.memory.memory import Memory
from nugget2d.memory.payload import EmbeddingsPayload, TextPayload
from nugget2d.modeling.cache import cached_states
from nugget2d.modeling.network import Network
from nugget2d.modeling.readout import final_norm, head_readout

BATCH = 4096  # tokens of the vocabulary that are compared at once


def decode_tokens(model: Network, memory: Memory) -> list[Tensor]:
    """The tokens of each segment, (m,) ids in the order of the text.

    These are nearly all of them if the model was trained with the read-out loss (`config.token_readout`), else those
    that were chosen as nuggets. A text payload is one part, its own tokens; embeddings are one part without any.

    Args:
        model: the one that made the memory.
        memory: of any ratio; tokens further before their nugget than its heads reach are missing.

    Raises:
        MismatchError: another model made it.
    """
    model.require(memory)
    if isinstance(memory.payload, TextPayload):
        return [model.ids(memory.payload.text)[0].cpu()]
    if isinstance(memory.payload, EmbeddingsPayload):
        return [torch.zeros(0, dtype=torch.long)]
    return [ids for ids, _ in _placed_tokens(model, memory)]


def decode_texts(model: Network, memory: Memory) -> list[str]:
    """The text of these tokens, segment by segment, with a space wherever some are missing.

    Raises:
        MismatchError: another model made it.
    """
    model.require(memory)
    if isinstance(memory.payload, TextPayload):
        return [memory.payload.text]
    if isinstance(memory.payload, EmbeddingsPayload):
        return [""]
    texts = []
    for ids, places in _placed_tokens(model, memory):
        gaps = (torch.diff(places) > 1).nonzero().flatten() + 1
        texts.append(" ".join(model.text(run.tolist()) for run in ids.tensor_split(gaps)))
    return texts


@torch.no_grad()
def _placed_tokens(model: Network, memory: Memory) -> list[tuple[Tensor, Tensor]]:
    """Tokens of each segment and their places in it, ascending."""
    reads_all = model.config.token_readout and memory.reader.role == "decoder"
    return (_by_head if reads_all else _chosen)(model, memory)


def _by_head(model: Network, memory: Memory) -> list[tuple[Tensor, Tensor]]:
    """The tokens between one nugget and the next, decoded from the value of each head (modeling/readout.py)."""
    readout, norm, head = head_readout(model), final_norm(model.lm), model.lm.get_output_embeddings()
    values = {layer: memory.values[layer].restore().to(model.device, model.lm.dtype) for layer in readout.layers}
    found = []
    for part in memory.segment_slices:
        nuggets = memory.local_positions[part].long()
        gaps = torch.diff(nuggets, prepend=torch.tensor([-1]))
        decoded, places = [], []
        for layer, mine in values.items():
            distances = readout.distances(layer)[:, None]
            inside = distances < gaps
            places.append((nuggets - distances)[inside])
            decoded.append(head(norm(readout.written(layer, mine[:, part])[inside.to(model.device)])).argmax(-1).cpu())
        order = torch.cat(places).argsort()
        found.append((torch.cat(decoded)[order], torch.cat(places)[order]))
    return found


def _chosen(model: Network, memory: Memory) -> list[tuple[Tensor, Tensor]]:
    """The tokens whose first-layer values are nearest: those depend on the token alone (and on learned positions).

    Where heads keep different tokens each is decoded by itself; tokens that only later layers keep are missing.
    """
    payload, prefix = memory.kv, len(memory.kv.prefix_ids)
    trained = memory.reader.role == "decoder"
    found = torch.full((len(payload.local_positions),), -1)
    if payload.heads is None:
        groups = [(torch.arange(len(found)), slice(None))]
        wanted = [payload.values[0].restore()[:, prefix:].transpose(0, 1).flatten(1)]  # (k, kv_heads x head_dim)
    else:
        groups = [(rows, slice(head, head + 1)) for head, rows in enumerate(payload.rows_of(0))]
        wanted = [values[prefix:] for _, values in payload.per_head(0)]
    for (rows, heads), values in zip(groups, wanted, strict=True):
        found[rows] = _nearest(model, values.to(model.device), heads, trained).cpu()
    parts = [(found[part], payload.local_positions[part].long()) for part in memory.segment_slices]
    return [(ids[ids >= 0], places[ids >= 0]) for ids, places in parts]


def _nearest(model: Network, wanted: Tensor, heads: slice, trained: bool) -> Tensor:
    """(k,) the tokens whose first-layer values of `heads` are nearest to (k, heads x head_dim)."""
    best = wanted.new_full((len(wanted),), -torch.inf)
    tokens = torch.zeros(len(wanted), dtype=torch.long, device=model.device)
    for ids in torch.arange(len(model.tokenizer), device=model.device).split(BATCH):
        embeds = model.embed(ids[:, None])
        if trained and model.flag is not None:
            embeds = embeds + model.flag.to(embeds.dtype)
        cache = model.encoder_states(embeds, layers=1, role="encoder" if trained else "base")
        values = cached_states(cache)[1][0][:, heads].flatten(1).to(wanted.dtype)
        nearness, index = (wanted @ values.T - values.square().sum(1) / 2).max(1)
        tokens = torch.where(nearness > best, ids[index], tokens)
        best = torch.maximum(nearness, best)
    return tokens
