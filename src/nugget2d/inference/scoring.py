"""Scoring: the likelihood of a text after a memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nugget2d.errors import InputError
from nugget2d.inference.prefix import prefix, prompt_ids, read
from nugget2d.memory.memory import Memory
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network


@dataclass(frozen=True, eq=False)
class Score:
    """The likelihood of a target, token by token.

    Attributes:
        losses: (t,) negative log-likelihoods in nats, float32. With nothing before it the first token, which nothing
            predicts, is left out.
        greedy: whether each of these tokens is the likeliest one.
    """

    losses: Tensor
    greedy: bool


def score_ids(model: Network, memory: Memory | None, before: Tensor, target: Tensor, *, start: bool = True) -> Score:
    """Score (1, t) `target` ids after a memory, if any, and (1, q) `before` ids; for `start` see `prefix`.

    Raises:
        InputError: no token to score, or more positions than the model has.
        MismatchError: the memory was made by another model.
    """
    ids = torch.cat([before, target], dim=1)
    opened = prefix(model, memory, ids.shape[1] - 1, start=start)
    first = before.shape[1] or int(memory is None and not opened.embeds.shape[1])
    counted = ids[:, first:]
    if not counted.numel():
        raise InputError("nothing to score: the text is empty or a single token that nothing predicts")
    logits = read(model, opened, model.embed(ids[:, :-1]))[:, -counted.shape[1] :]
    return Score(token_losses(logits, counted)[0], bool((logits.argmax(-1) == counted).all()))


def score(model: Network, text: str, memory: Memory | None, prompt: str | Sequence[int] = "") -> float:
    """See `Nugget2D.score`."""
    before = prompt_ids(model, memory, prompt)
    target = model.ids_after(text) if memory is not None or before.numel() else model.ids(text)
    return float(score_ids(model, memory, before, target, start=isinstance(prompt, str)).losses.mean())
