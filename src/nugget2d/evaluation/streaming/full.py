"""Baseline: the base LM on a sliding window of the last tokens after a start token, recomputed at each stride."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Full:
    """Recomputes the window for each `stride` tokens, so that tokens that have left it have no influence.

    Attributes:
        model: its base reads.
        window: states that the last of a stride sees: the start token, if there is one, and the last tokens to itself.
        stride: tokens predicted at a time.
    """

    model: Network
    window: int
    stride: int

    @torch.no_grad()
    def __call__(self, ids: Tensor, first: int) -> Tensor:
        """See `Reader`; `first` must be at least window - stride + 1."""
        tokens = self.window - (self.model.start_token is not None)
        count = -(-(len(ids) - first) // self.stride)
        # one token more in front of each window than is read at its end: the last is only predicted
        start = first + self.stride - 1 - tokens
        rows = F.pad(ids, (0, self.stride))[start:].unfold(0, tokens + 1, self.stride)[:count]
        losses = []
        with self.model.parameters_by_role.role("base") as lm:
            for batch in rows.split(max(1, BATCH_TOKENS // self.window)):
                read = self.model.after_start(batch[:, :-1])
                logits = lm(input_ids=read, use_cache=False, logits_to_keep=self.stride).logits
                losses.append(token_losses(logits, batch[:, -self.stride :]).flatten())
        return torch.cat(losses)[: len(ids) - first]


def equal_text(model: Network, text: int, chunk: int) -> Full:
    """A window of as many tokens as nuggets and uncompressed tokens stand for, or a few more.

    The stride is an eighth of the text: with that of a chunk, every token would be computed dozens of times. The first
    query of a stride sees at least as many tokens as with the other methods, the last up to an eighth more, and both
    the start token as well.
    """
    stride = max(chunk, text // 8)
    return Full(model, text + stride - chunk + 1, stride)
