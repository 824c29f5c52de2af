"""Reconstruction: greedy decoding of each segment's text from its own states, many segments in a batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nugget2d.errors import ExactFallbackWarning, InputError, MemoryFileError, warn
from nugget2d.inference.decoding import decode, greedy
from nugget2d.inference.placement import SegmentRef, segment_nuggets
from nugget2d.memory.exact import digest
from nugget2d.memory.memory import Memory
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.network import Network

# Segments decoded in a batch.
BATCH_ROWS = 64


@torch.no_grad()
def reconstruct_ids(
    model: Network,
    memories: Sequence[Memory],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[list[int]]]:
    """Tokens of every segment of every memory, by greedy decoding (with the patch of exact memories)."""
    for memory in memories:
        _require_reconstructible(model, memory)
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


def _require_reconstructible(model: Network, memory: Memory) -> None:
    model.require(memory)
    model.require_compressor()
    if memory.reader.role != "decoder" or memory.kv.heads is not None:
        raise InputError(
            f"a memory of method {memory.method.name!r} cannot be reconstructed: only nugget2d is trained to "
            "reconstruct text; compress with method='nugget2d', or generate and score from this one"
        )


def _verified(memory: Memory, parts: list[str]) -> list[str]:
    """The parts of an exact memory; those that do not match their digest come from the lossless copy."""
    record = memory.exact
    if record is None:
        return parts
    wrong = [number for number, part in enumerate(parts) if digest(part) != record.digests[number]]
    if not wrong:
        return parts
    warn(
        f"{len(wrong)} of {len(parts)} segments did not replay exactly on this machine; "
        "their text was taken from the lossless copy in the memory",
        ExactFallbackWarning,
    )
    text = record.text()
    for number in wrong:
        segment = memory.segments[number]
        parts[number] = text[segment.start : segment.end]
        if digest(parts[number]) != record.digests[number]:
            raise MemoryFileError("the lossless copy in this exact memory does not match its digest; compress again")
    return parts


def _replay(model: Network, rows: Sequence[SegmentRef]) -> list[list[int]]:
    """Greedy decoding of one segment a row; a token of the row's patch replaces the predicted one."""
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
    position = 0

    def read(embeds: Tensor) -> Tensor:
        nonlocal position
        mask = None
        if nuggets.valid is not None:
            mask = torch.nn.functional.pad(nuggets.valid, (0, position + 1), value=True).long()
        logits = lm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=torch.full((len(rows), 1), position, device=model.device),
            **as_cache(lm, cache),
            use_cache=True,
        ).logits[:, -1]
        position += 1
        return logits

    def choose(logits: Tensor, number: int) -> Tensor:
        return torch.where(forced[:, number] >= 0, forced[:, number], greedy(logits, number))

    with model.parameters_by_role.role("decoder") as lm:
        first = read(model.prompt("reconstruct", len(rows)).to(model.lm.dtype))
        tokens = decode(first, lambda token: read(model.embed(token[:, None])), choose, steps)
        output = torch.stack(list(tokens), dim=1)
    return [ids[:length] for ids, length in zip(output.tolist(), lengths, strict=True)]
