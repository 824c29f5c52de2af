"""Eviction: which nuggets are dropped when a stream holds more than `max_nuggets`. `keep_counts` is the policy."""

from collections.abc import Sequence
from dataclasses import replace

from nugget2d.memory.memory import Memory
from nugget2d.modeling.selection import even_ends


def keep_counts(counts: Sequence[int], most: int) -> list[int]:
    """How many nuggets each segment keeps, oldest first, so that all have `most` (at least 1) together.

    The oldest are evicted first: a segment loses nuggets only when all older segments have none left.
    """
    kept = []
    left = most
    for count in reversed(counts):
        kept.append(min(count, left))
        left -= kept[-1]
    return kept[::-1]


def evict(memories: Sequence[Memory], most: int) -> tuple[Memory, ...]:
    """Memories of one segment each, reduced to `most` nuggets in all; segments left without any are dropped."""
    counts = keep_counts([memory.num_nuggets for memory in memories], most)
    return tuple(_keep(memory, count) for memory, count in zip(memories, counts, strict=True) if count)


def _keep(memory: Memory, count: int) -> Memory:
    """`count` nuggets of a segment, evenly spaced, always with the last, which has seen the whole segment."""
    if count == memory.num_nuggets:
        return memory
    index = even_ends(memory.num_nuggets, count)
    segment = replace(memory.segments[0], num_nuggets=count, accuracy=None)
    return replace(memory, payload=memory.kv.pick(index), segments=(segment,))
