"""Compressing between the steps of running answers: a few segments at a time."""

from collections.abc import Generator, Sequence
from dataclasses import replace

from nugget2d.memory.memory import Memory
from nugget2d.memory.states import StoreDtype
from nugget2d.methods.nugget.encoding import encode, native_dtype
from nugget2d.modeling.network import Network
from nugget2d.modeling.selection import count_nuggets
from nugget2d.text.segmentation import Piece

# Tokens compressed at a time: running answers wait for so many.
TURN = 256


def compress(
    model: Network, pieces: Sequence[Piece], ratio: float, dtype: StoreDtype | None
) -> Generator[int, None, Memory]:
    """What `Nugget2D.compress` makes of the same segments; yields how many tokens are left.

    Args:
        model: that of the memory.
        pieces: of a text (`segmentation.split`).
        ratio: tokens for each nugget.
        dtype: of the stored states; None takes the model's own.
    """
    lengths = [len(piece.ids) for piece in pieces]
    counts = count_nuggets(lengths, ratio)
    left, done, memories = sum(lengths), 0, []
    while done < len(pieces):
        end = done + 1
        while end < len(pieces) and sum(lengths[done : end + 1]) <= TURN:
            end += 1
        drafts = encode(model, pieces[done:end], counts[done:end], model.config.selection, dtype or native_dtype(model))
        memories += [draft.memory for draft in drafts]
        left -= sum(lengths[done:end])
        done = end
        if left:
            yield left
    return Memory.join(memories)


def consecutive(model: Network, memories: Sequence[Memory]) -> Memory:
    """Memories of texts that follow each other as one, whatever their states were kept as."""
    if len({memory.dtype for memory in memories}) > 1 or len({memory.exact is None for memory in memories}) > 1:
        memories = [replace(memory, exact=None).to(native_dtype(model)) for memory in memories]
    return Memory.join(memories)
