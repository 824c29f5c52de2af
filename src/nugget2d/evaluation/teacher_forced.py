"""Token accuracy under teacher forcing, and the copy-span profile: where in a window the memory stops carrying."""

import torch
from torch import Tensor

from nugget2d.config import SelectionName
from nugget2d.losses import token_losses
from nugget2d.network import Network
from nugget2d.selection import count_nuggets


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

    `ratio` compresses the first `context` tokens as one segment; None shows the model nothing of them.
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
        logits = model.decode(None, ids[:, :-1], prompt=None)[:, max(context - 1, 0) :]
        losses.append(token_losses(logits, ids[:, max(context, 1) :]))
    return float(torch.cat(losses).mean())
