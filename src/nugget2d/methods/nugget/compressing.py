"""Texts to memories: cut, share out the nuggets, encode, join."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nugget2d.config import SelectionName
from nugget2d.errors import InputError
from nugget2d.memory.exact import ExactRecord
from nugget2d.memory.memory import Memory
from nugget2d.memory.states import StoreDtype
from nugget2d.methods.nugget.accuracy import meet_quality, warn_if_missed
from nugget2d.methods.nugget.encoding import BATCH_TOKENS, Draft, batches, encode, logits_limit, measure, native_dtype
from nugget2d.methods.nugget.optimization import refine, refine_limit
from nugget2d.modeling.network import Network
from nugget2d.modeling.selection import count_nuggets
from nugget2d.text.segmentation import Piece, split

DEFAULT_RATIO = 20.0


@torch.no_grad()
def compress_texts(
    model: Network,
    texts: Sequence[str],
    ratio: float | None,
    quality: float | None,
    steps: int,
    exact: bool,
    selection: SelectionName,
    dtype: StoreDtype | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[Memory]:
    """See `Nugget2D.compress`; `steps` is its `refine`."""
    _check(ratio, quality, steps)
    documents = [_cut(model, text, number) for number, text in enumerate(texts)]
    pieces = [piece for document in documents for piece in document]
    store = dtype or native_dtype(model)
    if quality is not None and not steps:
        drafts = meet_quality(model, pieces, quality, selection, store, on_progress)
    else:
        lengths = [[len(piece.ids) for piece in document] for document in documents]
        wanted = DEFAULT_RATIO if ratio is None else ratio
        counts = [count for document in lengths for count in count_nuggets(document, wanted)]

        def work(batch: list[int]) -> list[Draft]:
            encoded = encode(model, [pieces[i] for i in batch], [counts[i] for i in batch], selection, store)
            if steps:
                return refine(model, encoded, steps, 1.0 if quality is None else quality)
            return measure(model, encoded) if exact else encoded

        limit = refine_limit(model) if steps else BATCH_TOKENS
        limit = min(limit, logits_limit(model)) if steps or exact else limit
        drafts = _in_batches(pieces, limit, work, on_progress)
    if quality is not None:
        warn_if_missed(drafts, quality, "refine longer or lower the ratio" if steps else "every ratio was tried")
    ready = iter(drafts)
    return [_assemble([next(ready) for _ in document], exact) for document in documents]


def _check(ratio: float | None, quality: float | None, steps: int) -> None:
    if steps < 0:
        raise InputError(f"refine is a number of steps, 0 or more, got {steps}")
    if quality is not None and not 0 < quality <= 1:
        raise InputError(f"quality is a share of the tokens, above 0 and at most 1, got {quality}")
    if quality is not None and ratio is not None and not steps:
        raise InputError("quality chooses the ratio: give one of them, or refine as well, to stop refining at quality")


def _cut(model: Network, text: str, number: int) -> list[Piece]:
    if not isinstance(text, str):
        raise InputError(f"text {number} is {type(text).__name__}, not str; decode bytes first")
    pieces = split(model.tokenizer, text, model.config.window)
    if not pieces:
        raise InputError(f"text {number} is empty; there is nothing to compress")
    return pieces


def _in_batches(
    pieces: Sequence[Piece],
    limit: int,
    work: Callable[[list[int]], list[Draft]],
    on_progress: Callable[[int, int], None] | None,
) -> list[Draft]:
    """`work` on the indices of batch after batch; its drafts in the order of `pieces`."""
    drafts: dict[int, Draft] = {}
    for batch in batches(pieces, limit):
        drafts |= zip(batch, work(batch), strict=True)
        if on_progress is not None:
            on_progress(len(drafts), len(pieces))
    return [drafts[index] for index in range(len(pieces))]


def _assemble(document: Sequence[Draft], exact: bool) -> Memory:
    memory = Memory.join([draft.memory for draft in document])
    if not exact:
        return memory
    record = ExactRecord.make([draft.piece.text for draft in document], [draft.patch for draft in document])
    return replace(memory, exact=record)
