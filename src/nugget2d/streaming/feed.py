"""Tokenizes text that arrives in parts, into the same tokens as the whole text."""

import re

from transformers import PreTrainedTokenizerBase

from nugget2d.text.segmentation import require_utf8, tokenize

# A word longer than this is cut, so that scripts without spaces are not held back without limit.
LONGEST = 400

# From the last cut to where a space follows something else: tokenizers begin a new token there.
_UNIT = re.compile(rf".{{0,{LONGEST - 1}}}?\S(?= )|.{{{LONGEST}}}", re.DOTALL)


class TextFeed:
    """Holds back the last word, which the next part may continue; tokens do not depend on where the text was cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing held."""
        self._tokenizer = tokenizer
        self._before = ""  # the last unit returned: some tokenizers treat the start of a text differently
        self._held = ""

    def push(self, text: str) -> list[int]:
        """Tokens of all that was held and `text`, up to the last word, which is held.

        Raises:
            InputError: `text` holds lone surrogates; nothing of it is kept.
        """
        require_utf8(text)
        self._held += text
        ids: list[int] = []
        run, end = "", 0
        for unit in _UNIT.finditer(self._held):
            end = unit.end()
            run += unit[0]
            if len(unit[0]) == LONGEST:
                ids += self._tokens(run)
                run, self._before = "", ""
        ids += self._tokens(run)
        self._held = self._held[end:]
        return ids

    def flush(self) -> list[int]:
        """Tokens of what is held; the text that follows is tokenized as if it began there."""
        ids = self._tokens(self._held)
        self._held = self._before = ""
        return ids

    def copy(self) -> "TextFeed":
        """Another feed in the same state."""
        other = TextFeed(self._tokenizer)
        other._before, other._held = self._before, self._held
        return other

    def _tokens(self, text: str) -> list[int]:
        """Tokens of `text` as the continuation of the last unit, which is then replaced."""
        if not text:
            return []
        start = len(self._before)
        ids, offsets = tokenize(self._tokenizer, self._before + text)
        self._before = text[text.rfind(" ") :] if " " in text else text
        first = next((index for index, (_, end) in enumerate(offsets) if end > start), len(ids))
        if first < len(ids) and offsets[first][0] < start:  # a token across the start of `text`
            return tokenize(self._tokenizer, text)[0]
        return ids[first:]
