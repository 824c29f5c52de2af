"""Segments to nuggets, in padded batches, and how well the decoder reads what was kept of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nugget2d.config import SelectionName
from nugget2d.inference import reading
from nugget2d.memory.exact import SegmentPatch, find_patch
from nugget2d.memory.memory import Memory, Segment
from nugget2d.memory.states import States, StoreDtype
from nugget2d.modeling.network import Network
from nugget2d.modeling.selection import SCORED
from nugget2d.text.segmentation import Piece

# Tokens of a padded batch: large enough to fill the matrix products, small enough for any machine's memory.
BATCH_TOKENS = 8192
# Measuring computes logits for every token of a batch: half a gigabyte of float32, whatever the vocabulary.
BATCH_LOGITS = 1 << 27


@dataclass(frozen=True, eq=False)
class Draft:
    """One segment, compressed.

    Attributes:
        piece: its text and tokens.
        memory: of this segment alone, states as they will be kept.
        patch: the tokens that greedy decoding would miss (see exact.py); empty until measured.
    """

    piece: Piece
    memory: Memory
    patch: SegmentPatch

    @property
    def count(self) -> int:
        """Nuggets."""
        return self.memory.num_nuggets

    @property
    def accuracy(self) -> float:
        """Measured accuracy; nothing is known to be right before."""
        return self.memory.quality or 0.0


def logits_limit(model: Network) -> int:
    """Tokens of a batch whose logits are computed."""
    return max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.lm.config.vocab_size))


def native_dtype(model: Network) -> StoreDtype:
    """How states are kept when nobody asks for another dtype."""
    return "bfloat16" if model.lm.dtype == torch.bfloat16 else "float32"


def batches(pieces: Sequence[Piece], limit: int) -> Iterator[list[int]]:
    """Indices of pieces of similar length: at most `limit` tokens with padding, none padded by more than a third."""
    lengths = [len(piece.ids) for piece in pieces]
    batch: list[int] = []
    for index in sorted(range(len(pieces)), key=lengths.__getitem__):
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
    model: Network, pieces: Sequence[Piece], counts: Sequence[int], selection: SelectionName, store: StoreDtype
) -> list[Draft]:
    """Compress each piece, as one row of a batch, into its count of nuggets kept as `store`."""
    ids = pad([piece.ids for piece in pieces], model.device)
    features = model.token_features(ids)
    encoded = model.encode(
        ids,
        [len(piece.ids) for piece in pieces],
        counts,
        selection=selection,
        scores=model.scorer(features) if selection in SCORED else None,
    )
    nuggets, index = encoded.nuggets, encoded.index.int().cpu()
    rows = torch.arange(len(pieces), device=ids.device)[:, None]
    scores = model.scorer(features[rows, encoded.index]).cpu()
    keys, values = ([layer.cpu() for layer in states] for states in (nuggets.keys, nuggets.values))
    drafts = []
    for row, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
        # the padding is on the left: the last `count` slots are the row's own
        own = slice(index.shape[1] - count, None)
        positions = index[row, own].clone()
        memory = Memory(
            keys=tuple(States.store(layer[row, :, own].clone(), store) for layer in keys),
            values=tuple(States.store(layer[row, :, own].clone(), store) for layer in values),
            local_positions=positions,
            token_spans=torch.tensor([piece.offsets[p] for p in positions.tolist()], dtype=torch.int32) - piece.start,
            scores=scores[row, own].clone(),
            segments=(Segment(0, len(piece.text), len(piece.ids), count),),
            fingerprint=model.fingerprint,
            cache_itemsize=model.lm.dtype.itemsize,
        )
        drafts.append(Draft(piece, memory, {}))
    return drafts


def measure(model: Network, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with accuracy and patch, from one teacher-forced pass over the states as they will be kept."""
    ids = pad([draft.piece.ids for draft in drafts], model.device)
    nuggets = reading.segment_nuggets(model, [(draft.memory, 0) for draft in drafts])
    logits = model.decode(nuggets, ids[:, :-1], prompt="reconstruct")
    measured = []
    for draft, row_logits, row_ids in zip(drafts, logits, ids, strict=True):
        length = len(draft.piece.ids)
        row_logits, row_ids = row_logits[:length], row_ids[:length]
        right = int((row_logits.argmax(-1) == row_ids).sum())
        segment = replace(draft.memory.segments[0], accuracy=right / length)
        memory = replace(draft.memory, segments=(segment,))
        measured.append(Draft(draft.piece, memory, find_patch(row_logits, row_ids)))
    return measured
