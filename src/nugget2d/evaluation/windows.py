"""Held-out windows: a stretch of a document to compress, and the tokens that follow it."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError
from nugget2d.text.segmentation import detokenize, tokenize


@dataclass(frozen=True)
class Window:
    """`text`, which by itself tokenizes to exactly `ids`, and the `target` ids after it in its document."""

    text: str
    ids: list[int]
    target: list[int]


def sample_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[int]],
    count: int | None,
    length: int,
    *,
    target: int = 0,
    seed: int = 0,
) -> list[Window]:
    """Windows of `length` tokens with `target` more after them, none sharing a token with another.

    Documents take turns: one window from each that is long enough, in order, then a second from each, until there are
    `count`. A document is cut into equal parts, taken in random order; a window starts at a random place in its
    part or, where that text would tokenize differently by itself, at the next place.

    Args:
        tokenizer: what made the ids.
        documents: token ids of each document.
        count: None takes all there are.
        length: tokens of a window.
        target: tokens after it.
        seed: of the random places.

    Raises:
        InputError: there are fewer than `count`, or none.
    """
    draw = random.Random(seed)
    span = length + target
    sources = [_disjoint(tokenizer, ids, length, span, draw) for ids in documents if len(ids) >= span]
    windows: list[Window] = []
    while sources and len(windows) != count:
        for source in list(sources):
            window = next(source, None)
            if window is None:
                sources.remove(source)
            else:
                windows.append(window)
            if len(windows) == count:
                break
    if not windows or len(windows) < (count or 1):
        raise InputError(
            f"{len(documents)} documents have only {len(windows)} separate windows of {span} tokens, "
            f"{count or 1} are needed; give more text, or ask for fewer or shorter windows"
        )
    return windows


def _disjoint(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], length: int, span: int, draw: random.Random
) -> Iterator[Window]:
    parts = len(ids) // span
    size = len(ids) // parts
    places = size - span + 1
    for part in draw.sample(range(parts), parts):
        first = draw.randrange(places)
        for step in range(places):
            start = part * size + (first + step) % places
            inside = list(ids[start : start + length])
            text = detokenize(tokenizer, inside)
            if tokenize(tokenizer, text)[0] == inside:
                yield Window(text, inside, list(ids[start + length : start + span]))
                break
