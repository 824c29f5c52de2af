"""What the parts of a memory must satisfy together, checked when a file is read.

A checksum protects against accidents. Whoever makes a file can give it any header and tensors with the right checksum,
so all that readers rely on is checked: shapes and dtypes, counts, the order and range of positions and rows. Only the
model knows how many layers and heads it has, and its vocabulary (modeling/misfit.py).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from nugget2d.memory.kv import HeadSelection, KVPayload
from nugget2d.memory.payload import EmbeddingsPayload, TextPayload
from nugget2d.memory.records import ReaderSpec, Segment
from nugget2d.memory.states import STORE_DTYPES, States

AnyPayload = KVPayload | TextPayload | EmbeddingsPayload

INT32 = 1 << 31
# Above int8 with the largest scale, far above what any LM computes, and still finite after every layer.
LARGEST_STATE = 2.0**24
# A segment keeps at least one token, and its states and records take more bytes than it has tokens; a token stands for
# far less than 64 characters on average. Small memories may exceed both.
TOKENS_PER_BYTE, SMALL_TOKENS = 1, 1 << 16
CHARS_PER_BYTE, SMALL_CHARS = 64, 1 << 20


def require_segments(segments: Sequence[Segment]) -> None:
    """Check that segments follow each other from the start of a text whose tokens and characters int32 can count.

    Raises:
        ValueError: they do not.
    """
    _need(segments[0].start == 0, "the first segment does not begin at 0")
    _need(all(one.start <= one.end for one in segments), "a segment ends before it begins")
    _need(all(one.end == other.start for one, other in pairwise(segments)), "segments do not follow each other")
    _need(sum(one.num_tokens for one in segments) < INT32, "there are more tokens than int32 can count")


def require_expansion(segments: Sequence[Segment], nbytes: int) -> None:
    """Check that an exact memory of `nbytes` bytes does not claim a text far beyond what such a memory can stand for.

    Its patch and its copy are expanded up to these claims.

    Raises:
        ValueError: it does.
    """
    tokens, chars = sum(one.num_tokens for one in segments), segments[-1].end
    _need(
        tokens <= TOKENS_PER_BYTE * nbytes + SMALL_TOKENS, f"{nbytes:,} bytes cannot be exact about {tokens:,} tokens"
    )
    _need(
        chars <= CHARS_PER_BYTE * nbytes + SMALL_CHARS, f"{nbytes:,} bytes cannot be exact about {chars:,} characters"
    )


def require_payload(payload: AnyPayload, segments: Sequence[Segment], reader: ReaderSpec) -> None:
    """Check a payload against itself and its segments; the states are not looked at.

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    if isinstance(payload, KVPayload):
        _need((payload.last_id is None) == reader.soft_prompt, "either a soft prompt or the last token is read again")
        _require_table(payload, segments)
        _require_states(payload, segments)
        return
    if isinstance(payload, TextPayload):
        _need(bool(payload.text), "the text is empty")
    else:
        _require_kind(payload.vectors, "vectors", payload.vectors.dtype)
        _require_tensor(payload.vectors.data, "vectors", payload.vectors.data.dtype, (None, None))
        _need(payload.vectors.data.numel() > 0, "there are no vectors")
    rows = None if isinstance(payload, TextPayload) else payload.count
    _require_tensor(payload.spans, "spans", torch.int32, (rows, 2))
    _require_spans(payload.spans, segments[-1].end)


def require_finite(payload: AnyPayload) -> None:
    """Check all numbers of a payload, which reads all of a mapped file.

    Raises:
        ValueError: some are NaN, infinite, or so large that they would become so.
    """
    layers = (*payload.keys, *payload.values) if isinstance(payload, KVPayload) else ()
    layers = (payload.vectors,) if isinstance(payload, EmbeddingsPayload) else layers
    for states in layers:
        for numbers in (states.data, states.scale):
            if numbers is not None and numbers.is_floating_point():
                low, high = map(float, numbers.aminmax())  # of float16 the limit itself would be infinite
                _need(-LARGEST_STATE <= low <= high <= LARGEST_STATE, "states are not finite")


def _require_table(payload: KVPayload, segments: Sequence[Segment]) -> None:
    """The table of tokens: of each segment as many rows as it says, in the order of the text."""
    size = payload.local_positions.numel()
    _require_tensor(payload.local_positions, "local_positions", torch.int32, (size,))
    _require_tensor(payload.token_spans, "token_spans", torch.int32, (size, 2))
    _require_tensor(payload.scores, "scores", torch.float32, (size,))
    _need(all(1 <= one.num_nuggets <= one.num_tokens for one in segments), "a segment has no nuggets, or too many")
    _need(sum(one.num_nuggets for one in segments) == size, "segments and table differ in nuggets")
    _need(bool(payload.scores.isfinite().all()), "scores are not finite")
    counts, lengths = (torch.tensor([getattr(one, name) for one in segments]) for name in ("num_nuggets", "num_tokens"))
    local = payload.local_positions.long()
    segment = _parts(counts)  # of each row
    _need(bool(((local >= 0) & (local < lengths[segment])).all()), "a position is outside its segment")
    begins = lengths.cumsum(0) - lengths
    _need(bool((torch.diff(local + begins[segment]) > 0).all()), "positions are out of order")
    _require_spans(payload.token_spans, segments[-1].end)


def _require_states(payload: KVPayload, segments: Sequence[Segment]) -> None:
    prefix, size = len(payload.prefix_ids), len(payload.local_positions)
    dtype, heads = payload.dtype, payload.heads
    if heads is not None:
        _require_heads(heads, payload, segments)
    for layer, both in enumerate(zip(payload.keys, payload.values, strict=True)):
        for name, states in zip(("keys", "values"), both, strict=True):
            name = f"{name}.{layer}"
            if heads is None:
                shape: tuple[int | None, ...] = (
                    both[0].data.shape[0] if both[0].data.dim() else None,
                    prefix + size,
                    None,
                )
            else:
                shape = (len(heads.rows[layer]) + prefix * heads.counts.shape[2], None)
            _require_kind(states, name, dtype)
            _require_tensor(states.data, name, states.data.dtype, shape)
            _need(states.data.numel() > 0, f"{name} is empty")


def _require_heads(heads: HeadSelection, payload: KVPayload, segments: Sequence[Segment]) -> None:
    """Every head keeps rows of the table in their order, so many of each segment, and the last row."""
    _require_tensor(heads.counts, "heads.counts", torch.int32, (len(segments), len(payload.keys), None))
    counts = heads.counts.long()
    _need(counts.numel() > 0 and bool((counts >= 0).all()), "heads.counts has no heads, or a negative count")
    ends = torch.tensor(list(accumulate(one.num_nuggets for one in segments)))
    for layer, rows in enumerate(heads.rows):
        name, mine = f"heads.rows.{layer}", counts[:, layer]  # (segments, heads)
        _require_tensor(rows, name, torch.int32, (int(mine.sum()),))
        number = _parts(mine.sum(0))  # of each row's head
        rows = rows.long()
        _need(bool(((rows >= 0) & (rows < ends[-1])).all()), f"{name} has a row that is not in the table")
        _need(bool((torch.diff(number * ends[-1] + rows) > 0).all()), f"{name} is out of order")
        segment = torch.searchsorted(ends, rows, right=True)
        found = torch.bincount(segment * mine.shape[1] + number, minlength=mine.numel()).view_as(mine)
        _need(bool((found == mine).all()), f"{name} and heads.counts differ")
        last = torch.zeros(mine.shape[1], dtype=torch.bool)
        last[number[rows == ends[-1] - 1]] = True
        _need(bool(last.all()), f"{name}: a head has dropped the last token")


def _parts(counts: Tensor) -> Tensor:
    """Which part each row belongs to: 0 as often as the first count says, then 1, ...

    (torch's `repeat_interleave` starts threads for a handful of numbers: milliseconds on a busy machine.)
    """
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts.numpy()))


def _require_kind(states: States, name: str, dtype: str) -> None:
    """A dtype that states are kept as, the same everywhere; a scale for every row of int8, and only there."""
    _need(states.dtype in STORE_DTYPES and states.dtype == dtype, f"{name} is {states.dtype}")
    _need((states.scale is None) == (dtype != "int8"), f"{name} has a scale that it should not have, or none")
    if states.scale is not None:
        _require_tensor(states.scale, f"{name}.scale", torch.float16, (*states.data.shape[:-1], 1))


def _require_spans(spans: Tensor, chars: int) -> None:
    starts, ends = spans[:, 0], spans[:, 1]
    _need(bool(((starts >= 0) & (starts <= ends) & (ends <= chars)).all()), "a span is outside the text")


def _require_tensor(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """`None` is any size."""
    fits = tensor.dim() == len(shape) and all(
        want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    _need(tensor.dtype == dtype and fits, f"{name} is {tuple(tensor.shape)} of {tensor.dtype}")


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
