"""Token accuracy under teacher forcing, and the copy-span profile: accuracy by distance to the next nugget."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nugget2d.config import SelectionName
from nugget2d.inference.placement import segment_nuggets
from nugget2d.memory.memory import Memory
from nugget2d.methods.nugget.encoding import BATCH_LOGITS, pad
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network
from nugget2d.modeling.selection import count_nuggets
from nugget2d.text.segmentation import tokenize


@dataclass(frozen=True, eq=False)
class ReadBack:
    """Teacher-forced predictions of one memory's text; n tokens of all its segments in order.

    Attributes:
        hits: (n,) bool, the decoder's first choice is right.
        losses: (n,) nats.
        distance: (n,) long, tokens from each token to the nugget of its segment that follows it (0 = it is one).
    """

    hits: Tensor
    losses: Tensor
    distance: Tensor


@torch.no_grad()
def read_back(model: Network, memories: Sequence[Memory], texts: Sequence[str]) -> list[ReadBack]:
    """Predict the texts from their memories, each segment from its own nuggets as they are stored.

    Args:
        model: what made the memories.
        memories: of any number of segments each.
        texts: their texts.
    """
    jobs = []
    for number, (memory, text) in enumerate(zip(memories, texts, strict=True)):
        parts = [text[segment.start : segment.end] for segment in memory.segments]
        jobs += [(number, s, tokenize(model.tokenizer, part)[0]) for s, part in enumerate(parts)]
    rows = rows_at_once(model, max(len(ids) for _, _, ids in jobs))
    done: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
    jobs.sort(key=lambda job: len(job[2]))
    for start in range(0, len(jobs), rows):
        batch = jobs[start : start + rows]
        ids = pad([tokens for _, _, tokens in batch], model.device)
        logits = model.decode(
            segment_nuggets(model, [(memories[m], s) for m, s, _ in batch]), ids[:, :-1], prompt="reconstruct"
        )
        hits, losses = (logits.argmax(-1) == ids).cpu(), token_losses(logits, ids).cpu()
        for row, (m, s, tokens) in enumerate(batch):
            places = torch.arange(len(tokens))
            nuggets = memories[m].local_positions[memories[m].segment_slices[s]].long()
            distance = nuggets[torch.searchsorted(nuggets, places)] - places
            done[m, s] = hits[row, : len(tokens)], losses[row, : len(tokens)], distance
    return [
        ReadBack(*(torch.cat(parts) for parts in zip(*(done[m, s] for s in range(len(memory.segments))), strict=True)))
        for m, memory in enumerate(memories)
    ]


def rows_at_once(model: Network, tokens: int) -> int:
    """Rows of `tokens` tokens in one batch: a quarter of `BATCH_LOGITS`, as logits are copied."""
    return max(1, BATCH_LOGITS // 4 // (model.lm.config.vocab_size * tokens))


@torch.no_grad()
def reconstruction_hits(
    model: Network, windows: Tensor, ratio: float, *, selection: SelectionName | None = None, rows: int = 32
) -> tuple[Tensor, Tensor]:
    """Which tokens the decoder would predict right, given the true tokens before them.

    Args:
        model: the compressor.
        windows: (N, n) ids.
        ratio: k = ceil(n / ratio).
        selection: None takes the model's own.
        rows: windows in one batch.

    Returns:
        hits: (N, n) bool.
        distance: (N, n) long, tokens from each token to the nugget that follows it (0 = it is one).
    """
    hits, distances = [], []
    for ids in windows.split(rows):
        ids = ids.to(model.device)
        batch, length = ids.shape
        counts = count_nuggets([length], ratio) * batch
        encoded = model.encode(ids, [length] * batch, counts, selection=selection)
        logits = model.decode(encoded.nuggets, ids[:, :-1], prompt="reconstruct")
        hits.append((logits.argmax(-1) == ids).cpu())
        places = torch.arange(length, device=ids.device).expand(batch, -1).contiguous()
        following = encoded.index.gather(1, torch.searchsorted(encoded.index, places))
        distances.append((following - places).cpu())
    return torch.cat(hits), torch.cat(distances)


def copy_span_profile(hits: Tensor, distance: Tensor) -> list[float]:
    """Accuracy by distance from a token to the nugget that follows it; entry 0 is the nuggets' own tokens."""
    right = torch.bincount(distance.flatten(), weights=hits.flatten().double())
    total = torch.bincount(distance.flatten())
    return [round(value, 4) for value in (right / total.clamp(min=1)).tolist()]


@torch.no_grad()
def continuation_loss(model: Network, windows: Tensor, context: int, ratio: float | None, *, rows: int = 32) -> float:
    """Mean loss of the last n - `context` tokens of (N, n) windows, in nats.

    `ratio` compresses the first `context` tokens as one segment; None hides them.
    """
    losses = []
    for ids in windows.split(rows):
        ids = ids.to(model.device)
        batch, target = len(ids), ids[:, context:]
        nuggets = None
        if ratio is not None:
            counts = count_nuggets([context], ratio) * batch
            nuggets = model.encode(ids[:, :context], [context] * batch, counts).nuggets
        logits = model.decode(nuggets, target[:, :-1], prompt="continue", start=context)
        losses.append(token_losses(logits, target))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def lm_loss_per_token(model: Network, windows: Tensor, context: int, *, rows: int = 32) -> float:
    """Mean loss of tokens after the first `context` of (N, n) windows by plain language modelling, in nats."""
    losses = []
    for ids in windows.split(rows):
        ids = ids.to(model.device)
        target = ids[:, max(context, 1) :]
        logits = model.decode(None, model.after_start(ids[:, :-1]), prompt=None)[:, -target.shape[1] :]
        losses.append(token_losses(logits, target))
    return float(torch.cat(losses).mean())
