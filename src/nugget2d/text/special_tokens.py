"""Special tokens in rendered text: those of the template are tokens, those written in a message ordinary text."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError
from nugget2d.text.segmentation import tokenize, tokenize_after

_ANCHOR = "\n"

Span = tuple[int, int]  # characters [start, end)


def unused_character(text: str) -> str:
    """A private-use character that is not in `text`.

    Raises:
        InputError: they all are.
    """
    present = set(text)
    mark = next((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in present), None)
    if mark is None:
        raise InputError("the text holds every private-use character (U+E000 to U+F8FF) of Unicode; leave one out")
    return mark


class SpecialTokens:
    """The strings that a tokenizer takes for special tokens.

    Attributes:
        strings: the longest first, as it matches them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Those of `tokenizer`; there may be none."""
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.strings = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.strings)) or "(?!)")  # of none: matches nothing
        self._longest = max(map(len, self.strings), default=0)
        self._beginnings = {token[:n] for token in self.strings for n in range(1, len(token))}
        self._ends = {token[n:] for token in self.strings for n in range(1, len(token))}

    def mask(self, text: str, mark: str) -> str:
        """`text` with a `mark` for each character that is part of a special token, or may be with what is beside it."""
        text = self._pattern.sub(lambda match: mark * len(match[0]), text)
        sizes = range(1, min(self._longest, len(text) + 1))
        left = max((n for n in sizes if text[:n] in self._ends), default=0)
        right = max((n for n in sizes if text[len(text) - n :] in self._beginnings), default=0)
        return mark * left + text[left : max(left, len(text) - right)] + mark * min(right, len(text) - left)

    def find(self, text: str, masked: str, mark: str) -> tuple[Span, ...]:
        """The special tokens in `text` where `masked`, otherwise the same text, has a `mark`."""
        matches = self._pattern.finditer(text)
        return tuple(match.span() for match in matches if mark in masked[slice(*match.span())])


def tokenize_part(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, quoted: Sequence[Span] = ()
) -> list[int]:
    """The tokens of `text[start:end]`, special ones among them, but not in its `quoted` parts (in order)."""
    ids: list[int] = []
    place = start
    for first, last in [*quoted, (end, end)]:
        first, last = min(max(first, start), end), min(max(last, start), end)
        ids += _with_special(tokenizer, text[place:first], after=place > 0)
        ids += tokenize_after(tokenizer, text[first:last]) if first else tokenize(tokenizer, text[:last])[0]
        place = last
    return ids


def _with_special(tokenizer: PreTrainedTokenizerBase, text: str, *, after: bool) -> list[int]:
    """The tokens of `text`; `after` other text without the space that some tokenizers put first (`tokenize_after`)."""
    if after:
        anchor = tokenize(tokenizer, _ANCHOR)[0]
        ids = _with_special(tokenizer, _ANCHOR + text, after=False)
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
