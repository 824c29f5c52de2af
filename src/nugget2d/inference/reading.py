"""Reading memories: give the text back, score a continuation."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nugget2d.errors import ContextWarning, ExactFallbackWarning, InputError, MemoryFileError
from nugget2d.memory.exact import digest
from nugget2d.memory.memory import Memory
from nugget2d.memory.states import States
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network

# Segments decoded side by side.
BATCH_ROWS = 64

SegmentRef = tuple[Memory, int]  # a memory and the number of one of its segments


def segment_nuggets(model: Network, rows: Sequence[SegmentRef]) -> Nuggets:
    """One segment of one memory in each row, left-padded, keys at segment-local positions."""
    slices = [memory.segment_slices[number] for memory, number in rows]
    widest = max(part.stop - part.start for part in slices)

    def stack(layers: Sequence[Sequence[States]]) -> list[Tensor]:
        stacked = []
        for layer in range(len(layers[0])):
            parts = []
            for states, part in zip((states[layer] for states in layers), slices, strict=True):
                rows = states.pick(part).restore()
                parts.append(torch.nn.functional.pad(rows, (0, 0, widest - rows.shape[1], 0)))
            stacked.append(torch.stack(parts).to(model.device, model.lm.dtype))
        return stacked

    counts = torch.tensor([part.stop - part.start for part in slices], device=model.device)
    valid = torch.arange(widest, device=model.device) >= widest - counts[:, None]
    return Nuggets(
        stack([memory.keys for memory, _ in rows]),
        stack([memory.values for memory, _ in rows]),
        None if bool(valid.all()) else valid,
    )


def text_nuggets(model: Network, memory: Memory, room: int = 0) -> tuple[Nuggets, int]:
    """A memory as one row to go on from, every segment's keys rotated to where it stands, and the position after it.

    Positions beyond those of training make any model talk nonsense, so of a longer memory only the last segments are
    read, the first of them at position 0. `room` more positions will be needed: of a model whose positions end, fewer
    segments may be read.

    Warns:
        ContextWarning: the memory stands for more tokens than `config.context`, or than there is room for.
    """
    memory.require(model.fingerprint)
    limit = model.config.context if model.reach is None else min(model.config.context, model.reach - room)
    first = _first_within(memory, limit)
    if first:
        warnings.warn(
            f"the memory stands for {memory.num_tokens:,} tokens, model {model.config.name!r} goes on from "
            f"{limit:,} at most: only the last {len(memory.segments) - first} of its "
            f"{len(memory.segments)} segments are read",
            ContextWarning,
            stacklevel=4,
        )
    skipped = sum(segment.num_tokens for segment in memory.segments[:first])
    kept = slice(memory.segment_slices[first].start, None)
    nuggets = placed_nuggets(model, memory, kept, torch.tensor(memory.positions)[kept] - skipped)
    return nuggets, memory.num_tokens - skipped


def placed_nuggets(model: Network, memory: Memory, kept: slice, positions: Tensor) -> Nuggets:
    """The nuggets `kept` of a memory as one row, their keys rotated to `positions`, one for each."""
    device, dtype = model.device, model.lm.dtype
    keys = [states.restore()[None, :, kept].to(device) for states in memory.keys]
    shift = positions - memory.local_positions[kept]
    if shift.any():  # keys that cannot be moved can be read where they are
        keys = model.rotation(keys, shift[None])
    return Nuggets(
        [layer.to(dtype) for layer in keys],
        [states.restore()[None, :, kept].to(device, dtype) for states in memory.values],
    )


def join_rows(model: Network, nuggets: Nuggets, batch: int, segments: int, length: int) -> Nuggets:
    """Rows (batch * segments) of equal length as (batch) memories of consecutive segments, keys rotated into place."""
    if segments == 1:
        return nuggets

    def merge(states: Tensor) -> Tensor:
        _, heads, count, width = states.shape
        rows = states.view(batch, segments, heads, count, width).transpose(1, 2)
        return rows.reshape(batch, heads, segments * count, width)

    shift = torch.arange(segments, device=nuggets.keys[0].device).repeat(batch) * length
    keys = model.rotation(nuggets.keys, shift[:, None].expand(-1, nuggets.count))
    valid, bias = (None if one is None else one.reshape(batch, -1) for one in (nuggets.valid, nuggets.bias))
    return Nuggets([merge(k) for k in keys], [merge(v) for v in nuggets.values], valid, bias)


def _first_within(memory: Memory, limit: int) -> int:
    """The first of the last segments that together stand for at most `limit` tokens; at least one is taken."""
    tokens = 0
    for number in range(len(memory.segments) - 1, -1, -1):
        tokens += memory.segments[number].num_tokens
        if tokens > limit:
            return min(number + 1, len(memory.segments) - 1)
    return 0


@torch.no_grad()
def reconstruct_ids(
    model: Network,
    memories: Sequence[Memory],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """Tokens of every segment of every memory, by greedy decoding (with the patch of exact memories)."""
    for memory in memories:
        memory.require(model.fingerprint)
    jobs = [(m, s) for m, memory in enumerate(memories) for s in range(len(memory.segments))]
    jobs.sort(key=lambda job: memories[job[0]].segments[job[1]].num_tokens)
    result: list[list[list[int]]] = [[[] for _ in memory.segments] for memory in memories]
    for start in range(0, len(jobs), BATCH_ROWS):
        batch = jobs[start : start + BATCH_ROWS]
        for (m, s), ids in zip(batch, _replay(model, [(memories[m], s) for m, s in batch]), strict=True):
            result[m][s] = ids
        if on_progress is not None:
            on_progress(min(start + BATCH_ROWS, len(jobs)), len(jobs))
    return result


def reconstruct_texts(
    model: Network, memories: Sequence[Memory], on_progress: Callable[[int, int], None] | None
) -> list[str]:
    """See `Nugget2D.reconstruct`."""
    rows = reconstruct_ids(model, memories, on_progress)
    texts = []
    for memory, segments in zip(memories, rows, strict=True):
        parts = [model.text(ids) for ids in segments]
        texts.append("".join(parts if memory.exact is None else _verified(memory, parts)))
    return texts


def _verified(memory: Memory, parts: list[str]) -> list[str]:
    """The parts of an exact memory; those that do not match their digest come from the lossless copy."""
    record = memory.exact
    if record is None:
        return parts
    wrong = [number for number, part in enumerate(parts) if digest(part) != record.digests[number]]
    if not wrong:
        return parts
    warnings.warn(
        f"{len(wrong)} of {len(parts)} segments did not replay exactly on this machine; "
        "their text was taken from the lossless copy in the memory",
        ExactFallbackWarning,
        stacklevel=4,
    )
    text = record.text()
    for number in wrong:
        segment = memory.segments[number]
        parts[number] = text[segment.start : segment.end]
        if digest(parts[number]) != record.digests[number]:
            raise MemoryFileError("the lossless copy in this exact memory does not match its digest; compress again")
    return parts


def _replay(model: Network, rows: Sequence[SegmentRef]) -> list[list[int]]:
    """Greedy decoding of one segment a row; where the row has a patch, its token goes instead of the guess."""
    lengths = [memory.segments[number].num_tokens for memory, number in rows]
    steps = max(lengths)
    forced = torch.full((len(rows), steps), -1, dtype=torch.long)
    for row, (memory, number) in enumerate(rows):
        if memory.exact is not None:
            for index, patched in memory.exact.patches[number].items():
                forced[row, index] = patched
    forced = forced.to(model.device)
    nuggets = segment_nuggets(model, rows)
    cache = nuggets.to_cache(model.lm.config)
    embeds = model.prompt("reconstruct", len(rows)).to(model.lm.dtype)
    output = torch.empty_like(forced)
    with model.parameters_by_role.role("decoder") as lm:
        for step in range(steps):
            mask = None
            if nuggets.valid is not None:
                mask = torch.nn.functional.pad(nuggets.valid, (0, step + 1), value=True).long()
            logits = lm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=torch.full((len(rows), 1), step, device=model.device),
                **as_cache(lm, cache),
                use_cache=True,
            ).logits[:, -1]
            token = torch.where(forced[:, step] >= 0, forced[:, step], logits.argmax(-1))
            output[:, step] = token
            embeds = model.embed(token[:, None])
    return [ids[:length] for ids, length in zip(output.tolist(), lengths, strict=True)]


def score(model: Network, text: str, memory: Memory | None) -> float:
    """See `Nugget2D.score`."""
    if memory is not None:
        ids = model.ids_after(text)
        if not ids.numel():
            raise InputError("nothing to score: the text is empty")
        nuggets, end = text_nuggets(model, memory, room=ids.shape[1])
        logits = model.decode(nuggets, ids[:, :-1], prompt="continue", start=end)
        return float(token_losses(logits, ids).mean())
    ids = model.after_start(model.ids(text))
    if ids.shape[1] < 2:
        raise InputError("nothing to score: the text is empty or a single token that nothing predicts")
    logits = model.decode(None, ids[:, :-1], prompt=None)
    return float(token_losses(logits, ids[:, 1:]).mean())
