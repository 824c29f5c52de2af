"""Joins memories of consecutive texts, of any dtypes, into one."""

from collections.abc import Sequence
from dataclasses import replace

from nugget2d.memory.memory import Memory
from nugget2d.methods.base import native_dtype
from nugget2d.modeling.network import Network


def consecutive(model: Network, memories: Sequence[Memory]) -> Memory:
    """One memory of texts that follow each other.

    Raises:
        InputError: they were made by methods that are read in different ways.
    """
    if len({memory.dtype for memory in memories}) > 1 or len({memory.exact is None for memory in memories}) > 1:
        memories = [replace(memory, exact=None).to(native_dtype(model)) for memory in memories]
    return Memory.join(memories)
