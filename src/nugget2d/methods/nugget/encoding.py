"""Encodes segments in padded batches, and measures how accurately the decoder reads them back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nugget2d.config import SelectionName
from nugget2d.inference.placement import segment_nuggets
from nugget2d.memory.exact import SegmentPatch, find_patch
from nugget2d.memory.kv import KVPayload
from nugget2d.memory.memory import Memory, MethodRecord, ReaderSpec, Segment
from nugget2d.memory.states import States, StoreDtype
from nugget2d.methods.base import native_dtype
from nugget2d.modeling.network import Network
from nugget2d.modeling.selection import SCORED
from nugget2d.text.segmentation import TextSegment

# Tokens of a padded batch: large enough to fill the matrix products, small enough for any machine's memory.
BATCH_TOKENS = 8192
# Measuring computes logits for every token of a batch: half a gigabyte of float32, whatever the vocabulary.
BATCH_LOGITS = 1 << 27


class EncodeOptions(Protocol):
    """The part of a method's configuration that the encoder needs."""

    @property
    def selection(self) -> SelectionName | None:
        """Which tokens; None takes the model's own."""

    @property
    def dtype(self) -> StoreDtype | None:
        """How states are kept; None takes the model's precision."""

    @property
    def record(self) -> MethodRecord:
        """For the memory."""


@dataclass(frozen=True, eq=False)
class SegmentResult:
    """One segment, compressed.

    Attributes:
        segment: its text and tokens.
        memory: of this segment only, with states as they will be stored.
        patch: the tokens that greedy decoding would miss (see exact.py); empty until measured.
    """

    segment: TextSegment
    memory: Memory
    patch: SegmentPatch

    @property
    def count(self) -> int:
        """Nuggets."""
        return self.memory.num_nuggets

    @property
    def accuracy(self) -> float:
        """Measured accuracy; 0 before it is measured."""
        return self.memory.accuracy or 0.0


def logits_limit(model: Network) -> int:
    """Tokens of a batch whose logits are computed."""
    return max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.lm.config.vocab_size))


def batches(segments: Sequence[TextSegment], limit: int) -> Iterator[list[int]]:
    """Indices of segments of similar length: at most `limit` tokens with padding, none padded by more than a third."""
    lengths = [len(segment.ids) for segment in segments]
    batch: list[int] = []
    for index in sorted(range(len(segments)), key=lengths.__getitem__):
        length = lengths[index]
        if batch and ((len(batch) + 1) * length > limit or 4 * lengths[batch[0]] < 3 * length):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, n) ids, right-padded with 0."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def encode(
    model: Network, segments: Sequence[TextSegment], counts: Sequence[int], options: EncodeOptions
) -> list[SegmentResult]:
    """Compress each segment, as one row of a batch, into its count of nuggets."""
    selection, store = options.selection or model.config.selection, options.dtype or native_dtype(model)
    ids = pad([segment.ids for segment in segments], model.device)
    # scores are not needed for other policies
    scores = model.token_scores(ids) if selection in SCORED else None
    encoded = model.encode(ids, [len(one.ids) for one in segments], counts, selection=selection, scores=scores)
    nuggets, index = encoded.nuggets, encoded.index.int().cpu()
    picked = torch.ones(index.shape) if scores is None else scores.gather(1, encoded.index).cpu()
    keys, values = ([layer.cpu() for layer in states] for states in (nuggets.keys, nuggets.values))
    numbers = sum(layer.shape[1] * layer.shape[3] for layer in (*keys, *values))
    results = []
    for row, (segment, count) in enumerate(zip(segments, counts, strict=True)):
        # the padding is on the left: the last `count` entries are the row's own
        own = slice(index.shape[1] - count, None)
        positions = index[row, own].clone()
        spans = torch.tensor([segment.offsets[p] for p in positions.tolist()], dtype=torch.int32) - segment.start
        memory = Memory(
            payload=KVPayload(
                keys=tuple(States.store(layer[row, :, own].clone(), store) for layer in keys),
                values=tuple(States.store(layer[row, :, own].clone(), store) for layer in values),
                local_positions=positions,
                token_spans=spans,
                scores=picked[row, own].clone(),
            ),
            segments=(Segment(0, len(segment.text), len(segment.ids), count),),
            fingerprint=model.fingerprint,
            reader=ReaderSpec("decoder", soft_prompt=True, adapters=model.reader_digest),
            method=options.record,
            token_nbytes=numbers * model.lm.dtype.itemsize,
        )
        results.append(SegmentResult(segment, memory, {}))
    return results


def measure(model: Network, results: Sequence[SegmentResult]) -> list[SegmentResult]:
    """The results with accuracy and patch, from one teacher-forced pass over the states as they will be stored."""
    ids = pad([result.segment.ids for result in results], model.device)
    nuggets = segment_nuggets(model, [(result.memory, 0) for result in results])
    logits = model.decode(nuggets, ids[:, :-1], prompt="reconstruct")
    measured = []
    for result, row_logits, row_ids in zip(results, logits, ids, strict=True):
        length = len(result.segment.ids)
        row_logits, row_ids = row_logits[:length], row_ids[:length]
        right = int((row_logits.argmax(-1) == row_ids).sum())
        segment = replace(result.memory.segments[0], accuracy=right / length)
        memory = replace(result.memory, segments=(segment,))
        measured.append(SegmentResult(result.segment, memory, find_patch(row_logits, row_ids)))
    return measured
