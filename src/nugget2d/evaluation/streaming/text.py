"""Documents to blocks: the same scored tokens, after the same warm-up, for every method."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError
from nugget2d.text.segmentation import tokenize

# " = Title = " before an empty line begins an article of WikiText; " = = Part = = " and stray formulas do not
_TITLE = re.compile(r"^ = (?!= ).*(?<! =) = \n \n", re.MULTILINE)
_WORD = re.compile(r"(?<!\S)\S")


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive tokens of one document.

    Attributes:
        ids: (warm-up + scored,) tokens.
        words: whitespace-separated words that begin in the scored tokens; "<unk>" and "@-@" are words like others.
    """

    ids: Tensor
    words: int


def articles(text: str) -> list[str]:
    """A file of WikiText cut before each title; another text whole."""
    starts = [0, *(title.start() for title in _TITLE.finditer(text)), len(text)]
    parts = [text[start:end] for start, end in pairwise(starts)]
    return [part for part in parts if part.strip()]


def cut(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], warm_up: int, scored: int, tokens: int
) -> list[Block]:
    """Blocks of exactly `scored` scored tokens that tile each document behind its first `warm_up` tokens.

    What is left of a document is not scored. Of more than `tokens` scored tokens (rounded up to whole blocks), evenly
    spaced blocks are taken.

    Raises:
        InputError: no document is long enough.
    """
    blocks = [block for text in documents for block in _tiles(tokenizer, text, warm_up, scored)]
    if not blocks:
        raise InputError(f"no document has {warm_up + scored} tokens, a warm-up and a block; give longer texts")
    count = min(len(blocks), -(-tokens // scored))
    return [blocks[index * len(blocks) // count] for index in range(count)]


def _tiles(tokenizer: PreTrainedTokenizerBase, text: str, warm_up: int, scored: int) -> list[Block]:
    ids, offsets = tokenize(tokenizer, text)
    begins = [start for start, _ in offsets] + [len(text)]
    return [
        Block(
            torch.tensor(ids[first - warm_up : first + scored]),
            len(_WORD.findall(text, begins[first], begins[first + scored])),
        )
        for first in range(warm_up, len(ids) - scored + 1, scored)
    ]
