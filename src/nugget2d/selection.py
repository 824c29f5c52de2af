"""Which tokens become nuggets: the scorer, and the policies that choose from its scores or without them.

Every policy takes the last token of a segment: under a causal mask it alone has seen everything (Nugget2D,
section 3.1). The chosen indices are always in text order.
"""

from collections.abc import Callable, Sequence
from math import ceil
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nugget2d.config import SelectionName
from nugget2d.errors import InputError

# (scores (n,), delimiter flags (n,), k, generator) -> the indices chosen, any order, the last token may be missing
Policy = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]


class Scorer(nn.Module):
    """Linear-ReLU-Linear on a token's hidden state: (..., hidden) -> (...) scores (Nugget2D, section 3.1).

    States are scaled to unit root mean square first: an early layer's residual stream has no norm of its own, and the
    straight-through gradient does not restrain the scale of the scores.
    """

    def __init__(self, hidden_size: int) -> None:
        """Make the two layers, width `hidden_size` throughout."""
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Scores of `states`, in float32."""
        states = F.rms_norm(states.float(), states.shape[-1:]).to(self.hidden.weight.dtype)
        return self.output(F.relu(self.hidden(states))).squeeze(-1).float()


def even_ends(n: int, k: int) -> Tensor:
    """(k,) last index of each of k stretches of nearly equal length that tile n tokens."""
    return ((torch.arange(1, k + 1) * n + k // 2) // k - 1).clamp_(max=n - 1)


def _learned(scores: Tensor, delimiters: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return scores[:-1].topk(k - 1).indices


def _window(scores: Tensor, delimiters: Tensor, k: int, generator: torch.Generator) -> Tensor:
    ends = even_ends(len(scores), k).tolist()
    starts = [0, *(end + 1 for end in ends)]
    return torch.tensor(
        [start + int(scores[start : end + 1].argmax()) for start, end in zip(starts, ends[:-1], strict=False)],
        dtype=torch.long,
    )


def _even(scores: Tensor, delimiters: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return even_ends(len(scores), k)[:-1]


def _random(scores: Tensor, delimiters: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(scores) - 1, generator=generator)[: k - 1]


def _punctuation(scores: Tensor, delimiters: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Delimiters, thinned evenly if there are too many; the gaps' middles of what is left if too few."""
    marked = delimiters[:-1].nonzero().flatten()
    if len(marked) >= k - 1:
        return marked[even_ends(len(marked), k - 1)] if k > 1 else marked[:0]
    others = (~delimiters[:-1]).nonzero().flatten()
    return torch.cat([marked, others[even_ends(len(others), k - 1 - len(marked))]])


POLICIES: dict[SelectionName, Policy] = {
    "learned": _learned,
    "window": _window,
    "even": _even,
    "random": _random,
    "punctuation": _punctuation,
}
SCORED: frozenset[SelectionName] = frozenset({"learned", "window"})


def count_nuggets(lengths: Sequence[int], ratio: float) -> list[int]:
    """Nuggets for each of the consecutive segments of one text, ceil(n / ratio) in all but at least one each.

    Counts follow the running total, so that rounding up every segment does not eat into the ratio.

    Raises:
        InputError: ratio below 1.
    """
    if not ratio >= 1:
        raise InputError(f"ratio must be at least 1 (1 keeps every token), got {ratio}")
    counts = []
    tokens = given = 0
    for length in lengths:
        tokens += length
        counts.append(min(length, max(1, ceil(tokens / ratio) - given)))
        given += counts[-1]
    return counts


def select(
    name: SelectionName,
    ids: Tensor,
    lengths: Sequence[int],
    counts: Sequence[int],
    *,
    scores: Tensor | None = None,
    delimiters: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose nuggets for a right-padded batch.

    Args:
        name: the policy.
        ids: (B, n) tokens.
        lengths: tokens of each row (B).
        counts: nuggets wanted of each row (B), 1 <= counts[i] <= lengths[i].
        scores: (B, n) from the scorer, for the policies in `SCORED`.
        delimiters: (B, n) bool, which tokens end a clause, for "punctuation".
        generator: for "random"; None seeds each row with its tokens, so that a text gets the same nuggets in any batch.

    Returns:
        index: (B, K) long, ascending in each row, LEFT-padded with 0 to the largest count.
        valid: (B, K) bool, False on the padding.

    Raises:
        InputError: unknown policy, or a policy that got no scores or delimiters that it needs.
    """
    if name not in POLICIES:
        raise InputError(f"unknown selection {name!r}; choose one of {', '.join(POLICIES)}")
    if (scores is None and name in SCORED) or (delimiters is None and name == "punctuation"):
        raise InputError(f"selection {name!r} needs {'scores' if name in SCORED else 'delimiters'}")
    widest = max(counts)
    index = torch.zeros(len(lengths), widest, dtype=torch.long)
    valid = torch.zeros(len(lengths), widest, dtype=torch.bool)
    host_ids = ids.cpu()
    host_scores = torch.zeros(ids.shape) if scores is None else scores.detach().cpu()
    host_delimiters = torch.zeros(ids.shape, dtype=torch.bool) if delimiters is None else delimiters.cpu()
    for row, (n, k) in enumerate(zip(lengths, counts, strict=True)):
        last = torch.tensor([n - 1])
        if k > 1:
            source = generator or torch.Generator().manual_seed(crc32(host_ids[row, :n].numpy().tobytes()))
            chosen = POLICIES[name](host_scores[row, :n], host_delimiters[row, :n], k, source)
            last = torch.cat([chosen.sort().values, last])
        index[row, widest - k :] = last
        valid[row, widest - k :] = True
    return index.to(ids.device), valid.to(ids.device)
