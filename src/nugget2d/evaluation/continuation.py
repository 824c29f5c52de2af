"""Continuation: losses of the text after a context, given all, part or none of the context, or its memory.

Without memory the base predicts (adapters off). Its input starts at position 0, with the start token if the
tokenizer has one, as in `Nugget2D.score`: a shortened text has no gap before it. After a memory of n tokens the soft
prompt has position n, so that targets have the same positions as after the whole context.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from nugget2d.evaluation.teacher_forced import rows_at_once
from nugget2d.inference.scoring import score_ids
from nugget2d.memory.memory import Memory
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network


def counted_targets(model: Network, length: int) -> int:
    """How many of `length` target tokens count: all, or all but the first without a start token."""
    return length if model.start_token is not None else length - 1


@torch.no_grad()
def lm_losses(model: Network, contexts: Sequence[Sequence[int]], targets: Tensor) -> Tensor:
    """Losses of targets by plain language modelling.

    Args:
        model: its base predicts.
        contexts: N lists of ids, of any lengths; may be empty.
        targets: (N, t) ids.

    Returns:
        (N, `counted_targets`) nats.
    """
    counted = counted_targets(model, targets.shape[1])
    start = [] if model.start_token is None else [model.start_token]
    losses = torch.empty(len(targets), counted)
    alike: dict[int, list[int]] = defaultdict(list)
    for row, context in enumerate(contexts):
        alike[len(context)].append(row)
    for length, rows in alike.items():
        for batch in torch.tensor(rows).split(rows_at_once(model, len(start) + length + targets.shape[1])):
            before = torch.tensor([[*start, *contexts[row]] for row in batch.tolist()], dtype=torch.long)
            ids = torch.cat([before, targets[batch]], dim=1).to(model.device)
            logits = model.decode(None, ids[:, :-1], prompt=None)[:, -counted:]
            losses[batch] = token_losses(logits, ids[:, -counted:]).cpu()
    return losses


@torch.no_grad()
def no_memory_losses(model: Network, length: int, targets: Tensor) -> Tensor:
    """Losses of (N, t) targets by the decoder at positions after `length` unread tokens -> (N, `counted_targets`) nats.

    A control: the gain over it is due to the memory, the rest of the gain over the plain LM to the decoder's weights.
    """
    counted = counted_targets(model, targets.shape[1])
    losses = []
    for ids in targets.split(rows_at_once(model, targets.shape[1])):
        ids = ids.to(model.device)
        logits = model.decode(None, ids[:, :-1], prompt="continue", start=length)
        losses.append(token_losses(logits, ids)[:, -counted:].cpu())
    return torch.cat(losses)


@torch.no_grad()
def memory_losses(model: Network, memories: Sequence[Memory], targets: Tensor) -> Tensor:
    """Losses of (N, t) targets after N memories -> (N, `counted_targets`) nats.

    Warns:
        ContextWarning: a memory stands for more tokens than the model continues from.
    """
    counted = counted_targets(model, targets.shape[1])
    losses = []
    for memory, ids in zip(memories, targets[:, None].to(model.device), strict=True):
        losses.append(score_ids(model, memory, ids[:, :0], ids).losses[-counted:].cpu())
    return torch.stack(losses)
