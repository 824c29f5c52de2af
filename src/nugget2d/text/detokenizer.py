"""Incremental detokenization: complete characters only, and no part of a stop string."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from nugget2d.text.segmentation import REPLACEMENT, tokenize

# tokens of an unfinished character: it has four bytes at most, and is finished with the fourth
UNFINISHED = 3


class IncrementalDetokenizer:
    """The text of tokens that continue other text, as soon as it is certain; special tokens have none.

    The returned parts concatenate to the text of all tokens: a streamed answer equals one that is not streamed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing yet."""
        self._tokenizer = tokenizer
        # Tokens decoded last. Tokenizers of the Llama 2 family drop a space at the start of what they decode, so
        # nothing is decoded at a start: a line end is put before the first token.
        self._before = tokenize(tokenizer, "\n")[0]
        self._before_text = self._decode(self._before)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that became certain by one more token; "" while a character is unfinished."""
        self._held.append(token)
        text = self._text(self._held)
        if not text.endswith(REPLACEMENT):
            return self._release(len(self._held), text)
        # invalid bytes, which never become a character, must not hold back the text after them
        count = max(len(self._held) - UNFINISHED, 0)
        certain = self._text(self._held[:count])
        return self._release(count, certain) if text.startswith(certain) else ""

    def finish(self) -> str:
        """The rest, after the last token."""
        return self._release(len(self._held), self._text(self._held))

    def _release(self, count: int, text: str) -> str:
        """Return `text`, that of the first `count` held tokens, which are held no longer."""
        if text:  # after special tokens, which have no text, the next token is still at the start
            self._before = self._held[:count]
            self._before_text = self._decode(self._before)
        self._held = self._held[count:]
        return text

    def _text(self, ids: list[int]) -> str:
        """The text of `ids` as they continue the last tokens."""
        return self._decode([*self._before, *ids])[len(self._before_text) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Ends a text before the first of some strings; an end that one of them could begin with is held back.

    Attributes:
        found: one was found; text after it is dropped.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """The text will end before any of `strings` (none of them empty)."""
        self.found = False
        self._strings, self._held = tuple(strings), ""

    def push(self, text: str) -> str:
        """What of the held text and `text` belongs to no stop string."""
        if self.found:
            return ""
        text = self._held + text
        if places := [place for string in self._strings if (place := text.find(string)) >= 0]:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        return text

    def finish(self) -> str:
        """The held text, after the last part."""
        text, self._held = self._held, ""
        return text


class Transcript:
    """The text of one answer from its tokens, up to a stop string.

    Attributes:
        num_tokens: tokens pushed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """Nothing yet; see `StopStrings` for `stop`."""
        self.num_tokens = 0
        self._detokenizer, self._stop = IncrementalDetokenizer(tokenizer), StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found

    def push(self, token: int) -> str:
        """The text that became certain by one more token."""
        self.num_tokens += 1
        return self._stop.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """The rest, after the last token."""
        return self._stop.push(self._detokenizer.finish()) + self._stop.finish()


def detokenize_answer(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], stop: Sequence[str] = ()) -> str:
    """The text of all `ids`, as a `Transcript` returns it."""
    transcript = Transcript(tokenizer, stop)
    return "".join([*map(transcript.push, ids), transcript.finish()])


def _overlap(text: str, stop: str) -> int:
    """How long an end of `text` is the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
