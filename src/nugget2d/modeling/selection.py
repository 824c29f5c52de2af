"""Which tokens become nuggets: the scorer, and the policies that choose from its scores or without them.

Every policy takes the last token of a segment: under a causal mask only its state depends on all of it (Nugget2D,
section 3.1). The chosen indices are always in text order.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import ceil, isfinite
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nugget2d.config import SelectionName
from nugget2d.errors import InputError

# (scores (R, n), delimiter flags (R, n), k) -> (R, k - 1) the indices chosen besides the last token, in any order
Policy = Callable[[Tensor, Tensor, int], Tensor]


class Scorer(nn.Module):
    """Linear-ReLU-Linear on a token's hidden state: (..., hidden) -> (...) scores (Nugget2D, section 3.1).

    States are scaled to unit root mean square first: the residual stream of an early layer is not normalized, and the
    straight-through gradient does not limit the scale of the scores.
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


def _best(scores: Tensor, delimiters: Tensor, k: int) -> Tensor:
    return scores[:, :-1].topk(k - 1).indices


def _window(scores: Tensor, delimiters: Tensor, k: int) -> Tensor:
    n = scores.shape[1]
    ends = even_ends(n, k).to(scores.device)
    window = torch.searchsorted(ends, torch.arange(n, device=scores.device))
    inside = window == torch.arange(k - 1, device=scores.device)[:, None]  # (k - 1, n)
    return scores[:, None].masked_fill(~inside, -torch.inf).argmax(-1)


def _even(scores: Tensor, delimiters: Tensor, k: int) -> Tensor:
    return even_ends(scores.shape[1], k)[:-1].to(scores.device).expand(len(scores), -1)


def _punctuation(scores: Tensor, delimiters: Tensor, k: int) -> Tensor:
    """Delimiters, evenly spaced ones of them if there are too many, and evenly spaced other tokens if too few."""
    return torch.stack([_spaced(row[:-1], k - 1) for row in delimiters])


def _spaced(wanted: Tensor, count: int) -> Tensor:
    first, rest = wanted.nonzero().flatten(), (~wanted).nonzero().flatten()
    if len(first) < count:
        return torch.cat([first, rest[even_ends(len(rest), count - len(first)).to(rest.device)]])
    return first[even_ends(len(first), count).to(first.device)]


def ends_clause(token: str) -> bool:
    """Whether the text of a token ends a clause: with a line end or a punctuation mark."""
    return token.endswith("\n") or token.strip().endswith((".", ",", ";", ":", "!", "?"))


POLICIES: dict[SelectionName, Policy] = {
    "learned": _best,
    "window": _window,
    "even": _even,
    "random": _best,  # of random scores
    "punctuation": _punctuation,
}
SCORED: frozenset[SelectionName] = frozenset({"learned", "window"})


def count_nuggets(lengths: Sequence[int], ratio: float) -> list[int]:
    """Nuggets for each of the consecutive segments of one text, ceil(n / ratio) in all but at least one each.

    Counts follow the running total, so that rounding up in every segment does not lower the ratio of the whole text.

    Raises:
        InputError: a ratio below 1, NaN or infinite.
    """
    if not (ratio >= 1 and isfinite(ratio)):
        raise InputError(f"ratio must be at least 1 (1 keeps every token) and finite, got {ratio}")
    counts: list[int] = []
    tokens = given = 0
    for length in lengths:
        counts.append(next_count(tokens, given, length, ratio))
        tokens += length
        given += counts[-1]
    return counts


def next_count(tokens: int, given: int, length: int, ratio: float) -> int:
    """Nuggets for a segment of `length` tokens, after `tokens` tokens that have `given` nuggets."""
    return min(length, max(1, ceil((tokens + length) / ratio) - given))


def share_nuggets(lengths: Sequence[int], count: int) -> list[int]:
    """`count` nuggets shared out over the consecutive segments of one text by their lengths, at least one each.

    Raises:
        InputError: fewer nuggets than segments.
    """
    if count < len(lengths):
        raise InputError(
            f"a text of {sum(lengths):,} tokens is compressed in {len(lengths)} segments of at least one nugget, "
            f"the budget has room for {count}; raise it"
        )
    counts: list[int] = []
    tokens = given = 0
    for number, length in enumerate(lengths, start=1):
        tokens += length
        free = count - given - (len(lengths) - number)  # the others have one each
        counts.append(min(length, free, max(1, ceil(tokens * count / sum(lengths)) - given)))
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
    if name == "random":
        scores = _noise(ids, lengths, generator)
    scores = torch.zeros(ids.shape, device=ids.device) if scores is None else scores.detach()
    delimiters = torch.zeros_like(ids, dtype=torch.bool) if delimiters is None else delimiters
    widest = max(counts)
    index = torch.zeros(len(lengths), widest, dtype=torch.long, device=ids.device)
    valid = torch.zeros(len(lengths), widest, dtype=torch.bool, device=ids.device)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, size in enumerate(zip(lengths, counts, strict=True)):
        alike[size].append(row)
    for (n, k), rows in alike.items():
        if k > 1:
            index[rows, widest - k : -1] = POLICIES[name](scores[rows, :n], delimiters[rows, :n], k).sort().values
        index[rows, -1] = n - 1
        valid[rows, widest - k :] = True
    return index, valid


def _noise(ids: Tensor, lengths: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """(B, n) random scores: from `generator`, or from each row's own tokens."""
    if generator is not None:
        return torch.rand(ids.shape, generator=generator).to(ids.device)
    noise = torch.zeros(ids.shape)
    for row, (tokens, n) in enumerate(zip(ids.cpu(), lengths, strict=True)):
        noise[row, :n] = torch.rand(n, generator=generator_of(tokens[:n]))
    return noise.to(ids.device)


def generator_of(tokens: Tensor) -> torch.Generator:
    """A generator seeded by (n,) tokens: draws for a text are the same in any batch."""
    return torch.Generator().manual_seed(crc32(tokens.numpy().tobytes()))
