"""The losses: autoencoding, continuation, streams and plain language modelling (Nugget2D, sections 3 and 4).

All take (B, n) ids on the model's device and return mean nats per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nugget2d.cache import Nuggets
from nugget2d.config import SelectionName
from nugget2d.losses import token_losses
from nugget2d.network import Encoded, Network
from nugget2d.reading import join_rows
from nugget2d.streaming.layout import Layout
from nugget2d.streaming.parallel import mixed_logits


def reconstruct_loss(
    model: Network, ids: Tensor, counts: Sequence[int], selection: SelectionName, generator: torch.Generator
) -> tuple[Tensor, Encoded]:
    """Autoencoding: predict every token of a window from its nuggets, `counts` (B) of them."""
    batch, length = ids.shape
    encoded = model.encode(ids, [length] * batch, counts, selection=selection, generator=generator)
    logits = model.decode(encoded.nuggets, ids[:, :-1], prompt="reconstruct")
    return token_losses(logits, ids).mean(), encoded


def continue_loss(
    model: Network,
    ids: Tensor,
    segments: int,
    length: int,
    counts: Sequence[int],
    selection: SelectionName,
    generator: torch.Generator,
) -> Tensor:
    """Continuation: `segments` windows of `length` tokens are compressed one by one and joined; predict what follows.

    Row i has counts[i] nuggets in each of its segments.
    """
    logits = _continuation(model, ids, segments, length, counts, selection, generator)
    return token_losses(logits, ids[:, segments * length :]).mean()


def distill_loss(
    model: Network,
    ids: Tensor,
    segments: int,
    length: int,
    counts: Sequence[int],
    selection: SelectionName,
    generator: torch.Generator,
) -> Tensor:
    """Continuation that learns from the base, which sees the whole context, instead of from the text that follows.

    Mean of forward and reverse Kullback-Leibler divergence of the predictions (KV-Distill, arXiv 2503.10337). No
    gradient reaches the teacher; with copies it is the decoder's own weights, so `lm` must be trained beside it.
    """
    student = _continuation(model, ids, segments, length, counts, selection, generator).float().log_softmax(-1)
    with torch.no_grad():
        teacher = model.decode(None, ids[:, :-1], prompt=None)[:, segments * length - 1 :].float().log_softmax(-1)
    difference = teacher - student
    return 0.5 * (difference * (teacher.exp() - student.exp())).sum(-1).mean()


def _continuation(
    model: Network,
    ids: Tensor,
    segments: int,
    length: int,
    counts: Sequence[int],
    selection: SelectionName,
    generator: torch.Generator,
) -> Tensor:
    """(B, n - segments * length, V): what the decoder predicts after the joined memories of the segments."""
    target = ids[:, segments * length :]
    nuggets, _ = _memories(model, ids, segments, length, counts, selection, generator)
    return model.decode(nuggets, target[:, :-1], prompt="continue", start=segments * length)


def stream_loss(
    model: Network, ids: Tensor, layout: Layout, count: int, selection: SelectionName, generator: torch.Generator
) -> tuple[Tensor, Encoded]:
    """Autoregressive mode: the likelihood of a text that is read as a stream reads it (Nugget2D, section 3.3).

    (B, layout.length) ids: each of its segments becomes `count` nuggets; a token sees the segments that have left it
    behind as nuggets, and at least tau tokens before it whole. The loss is of those that see nuggets. Returned with it
    are the nuggets, a row for each segment.
    """
    counts = [count] * len(ids)
    nuggets, encoded = _memories(model, ids, layout.segments, layout.chunk, counts, selection, generator)
    first = layout.tau + layout.chunk
    return token_losses(mixed_logits(model, nuggets, ids, layout)[:, first:-1], ids[:, first + 1 :]).mean(), encoded


def _memories(
    model: Network,
    ids: Tensor,
    segments: int,
    length: int,
    counts: Sequence[int],
    selection: SelectionName,
    generator: torch.Generator,
) -> tuple[Nuggets, Encoded]:
    """The joined memories of the first `segments` windows of `length` tokens, counts[i] nuggets of each in row i.

    Returned with them is what was joined, a row for each window.
    """
    rows = ids[:, : segments * length].reshape(-1, length)
    each = [count for count in counts for _ in range(segments)]
    encoded = model.encode(rows, [length] * len(rows), each, selection=selection, generator=generator)
    return join_rows(model, encoded.nuggets, len(ids), segments, length), encoded


def lm_loss(model: Network, ids: Tensor) -> Tensor:
    """Plain language modelling by the base, all but the first of (B, n) tokens."""
    logits = model.decode(None, model.after_start(ids[:, :-1]), prompt=None)
    return token_losses(logits[:, 1 - ids.shape[1] :], ids[:, 1:]).mean()
