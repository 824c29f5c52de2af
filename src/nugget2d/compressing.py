"""Texts to memories: cut, batch, encode, keep."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nugget2d import reading
from nugget2d.config import SelectionName
from nugget2d.errors import InputError
from nugget2d.exact import ExactRecord, SegmentPatch, find_patch
from nugget2d.memory import Memory, Segment
from nugget2d.network import Network
from nugget2d.segmentation import Piece, split
from nugget2d.selection import SCORED, count_nuggets
from nugget2d.states import States, StoreDtype

# Tokens of a padded batch: large enough to fill the matrix products, small enough for any machine's memory.
BATCH_TOKENS = 8192
# Exact mode computes logits for every token of a batch: half a gigabyte of float32, whatever the vocabulary.
BATCH_LOGITS = 1 << 27


@dataclass
class _Job:
    """One piece of a document, its share of the nuggets, and what comes of it."""

    piece: Piece
    count: int
    memory: Memory | None = None
    patch: SegmentPatch = field(default_factory=dict)


@torch.no_grad()
def compress_texts(
    model: Network,
    texts: Sequence[str],
    ratio: float,
    exact: bool,
    selection: SelectionName,
    dtype: StoreDtype | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[Memory]:
    """See `Nugget2D.compress`."""
    documents = [_plan(model, text, ratio, number) for number, text in enumerate(texts)]
    jobs = [job for document in documents for job in document]
    store = dtype or ("bfloat16" if model.lm.dtype == torch.bfloat16 else "float32")
    done = 0
    limit = min(BATCH_TOKENS, BATCH_LOGITS // model.lm.config.vocab_size) if exact else BATCH_TOKENS
    for batch in _batches(jobs, limit):
        _encode(model, batch, selection, store)
        if exact:
            _find_patches(model, batch)
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(jobs))
    return [_assemble(document, exact) for document in documents]


def _plan(model: Network, text: str, ratio: float, number: int) -> list[_Job]:
    if not isinstance(text, str):
        raise InputError(f"text {number} is {type(text).__name__}, not str; decode bytes first")
    pieces = split(model.tokenizer, text, model.config.window)
    if not pieces:
        raise InputError(f"text {number} is empty; there is nothing to compress")
    counts = count_nuggets([len(piece.ids) for piece in pieces], ratio)
    return [_Job(piece, count) for piece, count in zip(pieces, counts, strict=True)]


def _batches(jobs: Sequence[_Job], limit: int) -> Iterator[list[_Job]]:
    """Jobs of similar length together: at most `limit` tokens with padding, none padded by more than a third."""
    batch: list[_Job] = []
    for job in sorted(jobs, key=lambda job: len(job.piece.ids)):
        length = len(job.piece.ids)
        if batch and ((len(batch) + 1) * length > limit or 4 * len(batch[0].piece.ids) < 3 * length):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, n) ids, right-padded with 0."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def _encode(model: Network, batch: list[_Job], selection: SelectionName, store: StoreDtype) -> None:
    ids = pad([job.piece.ids for job in batch], model.device)
    features = model.token_features(ids)
    encoded = model.encode(
        ids,
        [len(job.piece.ids) for job in batch],
        [job.count for job in batch],
        selection=selection,
        scores=model.scorer(features) if selection in SCORED else None,
    )
    nuggets, index = encoded.nuggets, encoded.index.int().cpu()
    rows = torch.arange(len(batch), device=ids.device)[:, None]
    scores = model.scorer(features[rows, encoded.index]).cpu()
    keys, values = ([layer.cpu() for layer in states] for states in (nuggets.keys, nuggets.values))
    for row, job in enumerate(batch):
        # the padding is on the left: the last `count` slots are the row's own
        own = slice(index.shape[1] - job.count, None)
        positions = index[row, own].clone()
        job.memory = Memory(
            keys=tuple(States.store(layer[row, :, own].clone(), store) for layer in keys),
            values=tuple(States.store(layer[row, :, own].clone(), store) for layer in values),
            local_positions=positions,
            token_spans=torch.tensor([job.piece.offsets[p] for p in positions.tolist()], dtype=torch.int32)
            - job.piece.start,
            scores=scores[row, own].clone(),
            segments=(Segment(0, len(job.piece.text), len(job.piece.ids), job.count),),
            fingerprint=model.fingerprint,
            cache_itemsize=model.lm.dtype.itemsize,
        )


def _find_patches(model: Network, batch: list[_Job]) -> None:
    """One teacher-forced pass over the states as they will be kept: what would greedy decoding miss?"""
    ids = pad([job.piece.ids for job in batch], model.device)
    nuggets = reading.segment_nuggets(model, [(job.memory, 0) for job in batch if job.memory is not None])
    logits = model.decode(nuggets, ids[:, :-1], prompt="reconstruct")
    for row, job in enumerate(batch):
        length = len(job.piece.ids)
        job.patch = find_patch(logits[row, :length], ids[row, :length])


def _assemble(document: list[_Job], exact: bool) -> Memory:
    memory = Memory.join([job.memory for job in document if job.memory is not None])
    if not exact:
        return memory
    record = ExactRecord.make([job.piece.text for job in document], [job.patch for job in document])
    return replace(memory, exact=record)
