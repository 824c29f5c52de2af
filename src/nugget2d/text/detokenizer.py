"""Tokens to the text that a client may see: whole characters, and nothing of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nugget2d.text.segmentation import REPLACEMENT, detokenize_after


class Transcript:
    """The text of one answer as its tokens come.

    What is held back: bytes of an unfinished character, and an end that a stop string could begin with.

    Attributes:
        num_tokens: tokens pushed.
        stopped: a stop string has come; nothing after it counts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """Nothing yet; the text will end before the first of the `stop` strings (none of them empty)."""
        self.num_tokens = 0
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._before: list[int] = []  # tokens decoded last: some tokenizers drop a space at the start of a text
        self._before_text = ""
        self._unfinished: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """The text that became certain by one more token."""
        self.num_tokens += 1
        self._unfinished.append(token)
        both = self._decode([*self._before, *self._unfinished])
        if both.endswith(REPLACEMENT):
            return ""
        text = both[len(self._before_text) :]
        self._before, self._unfinished = self._unfinished, []
        self._before_text = self._decode(self._before)
        return self._release(text)

    def finish(self) -> str:
        """The rest, when no token will come any more."""
        text = self._decode([*self._before, *self._unfinished])[len(self._before_text) :]
        self._before, self._before_text, self._unfinished = [], "", []
        text, self._held = self._release(text) + self._held, ""
        return text

    def _release(self, text: str) -> str:
        """What of the held text and `text` cannot belong to a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        if found := [place for stop in self._stop if (place := text.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return detokenize_after(self._tokenizer, ids)


def _overlap(text: str, stop: str) -> int:
    """How long an end of `text` is the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
