"""The losses: autoencoding, continuation, streams and plain language modelling (Nugget2D, sections 3 and 4).

All take (B, n) ids on the model's device and return mean nats per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nugget2d.config import SelectionName
from nugget2d.inference.placement import join_rows
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Encoded, Network
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


@dataclass(frozen=True, eq=False)
class Contexts:
    """Texts whose beginnings are compressed, window by window.

    Attributes:
        ids: (B, n).
        segments: how many windows are compressed.
        length: tokens of each window.
        counts: nuggets of each of a row's windows, B numbers.
        selection: which tokens they are.
        generator: for random selection.
    """

    ids: Tensor
    segments: int
    length: int
    counts: Sequence[int]
    selection: SelectionName
    generator: torch.Generator

    @property
    def end(self) -> int:
        """Where the rest of the text begins."""
        return self.segments * self.length

    def memories(self, model: Network) -> tuple[Nuggets, Encoded]:
        """The joined memories of the windows; and what was joined, a row for each window."""
        rows = self.ids[:, : self.end].reshape(-1, self.length)
        each = [count for count in self.counts for _ in range(self.segments)]
        encoded = model.encode(
            rows, [self.length] * len(rows), each, selection=self.selection, generator=self.generator
        )
        return join_rows(model, encoded.nuggets, len(self.ids), self.segments, self.length), encoded


def continue_loss(model: Network, contexts: Contexts) -> Tensor:
    """Continuation: predict what follows the windows from their memories."""
    return token_losses(_continuation(model, contexts), contexts.ids[:, contexts.end :]).mean()


def distill_loss(model: Network, contexts: Contexts) -> Tensor:
    """Continuation that learns from the base, which sees the whole context, instead of from the text that follows.

    Mean of forward and reverse Kullback-Leibler divergence of the predictions (KV-Distill, arXiv 2503.10337). No
    gradient reaches the teacher; with copies it is the decoder's own weights, so `lm` must be trained beside it.
    """
    student = _continuation(model, contexts).float().log_softmax(-1)
    with torch.no_grad():
        teacher = model.decode(None, contexts.ids[:, :-1], prompt=None)[:, contexts.end - 1 :].float().log_softmax(-1)
    difference = teacher - student
    return 0.5 * (difference * (teacher.exp() - student.exp())).sum(-1).mean()


def _continuation(model: Network, contexts: Contexts) -> Tensor:
    """(B, n - end, V): what the decoder predicts after the memories."""
    target = contexts.ids[:, contexts.end :]
    return model.decode(contexts.memories(model)[0], target[:, :-1], prompt="continue", start=contexts.end)


def stream_loss(
    model: Network, ids: Tensor, layout: Layout, count: int, selection: SelectionName, generator: torch.Generator
) -> tuple[Tensor, Encoded]:
    """Autoregressive mode: the likelihood of a text that is read as a stream reads it (Nugget2D, section 3.3).

    (B, layout.length) ids: each of its segments becomes `count` nuggets; a token sees the segments that have left it
    behind as nuggets, and at least recent_window tokens before it uncompressed. The loss is of those that see nuggets.
    Returned with it are the nuggets, a row for each segment.
    """
    contexts = Contexts(ids, layout.segments, layout.chunk, [count] * len(ids), selection, generator)
    nuggets, encoded = contexts.memories(model)
    first = layout.recent_window + layout.chunk
    return token_losses(mixed_logits(model, nuggets, ids, layout)[:, first:-1], ids[:, first + 1 :]).mean(), encoded


def lm_loss(model: Network, ids: Tensor) -> Tensor:
    """Plain language modelling by the base, all but the first of (B, n) tokens."""
    logits = model.decode(None, model.after_start(ids[:, :-1]), prompt=None)
    return token_losses(logits[:, 1 - ids.shape[1] :], ids[:, 1:]).mean()
