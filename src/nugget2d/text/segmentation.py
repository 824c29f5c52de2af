"""Tokenization, and the segmentation of long texts into lengths that a model was trained on."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError

_ANCHOR = "\n"
REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished character to
_CLOSERS = "\"')]}»”’"
_SENTENCE_ENDS = ".!?…。！？"
# Unicode categories that continue the character before: marks, joiners and variation selectors, skin tones
_CONTINUES = {"Mn", "Mc", "Me", "Cf", "Sk"}


@dataclass(frozen=True)
class TextSegment:
    """A stretch `text` of a document, starting at character `start`, as token `ids` with character `offsets`.

    Offsets are relative to the whole document.
    """

    text: str
    start: int
    ids: list[int]
    offsets: list[tuple[int, int]]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text` and the characters [start, end) of each.

    Nothing is added, and literal strings such as "</s>" are ordinary text, never special tokens.

    Raises:
        InputError: `text` holds lone surrogates, which no UTF-8 file can contain.
    """
    require_utf8(text)
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def require_utf8(text: str) -> None:
    """Check that `text` can be encoded.

    Raises:
        InputError: it has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate at character {error.start}, which UTF-8 cannot hold; "
            "decode the source with the right encoding"
        ) from error


def require_tokens(tokens: Sequence[int] | Tensor, size: int) -> list[int]:
    """`tokens` as a list.

    Args:
        tokens: ids, in any sequence.
        size: of the LM's vocabulary.

    Raises:
        InputError: it is no sequence, or one of them is no id.
    """
    if isinstance(tokens, bytes) or not isinstance(tokens, Iterable):
        raise InputError(f"expected a text or a sequence of token ids, got {type(tokens).__name__}")
    ids = tokens.flatten().tolist() if isinstance(tokens, Tensor) else list(tokens)
    for index, token in enumerate(ids):
        if not isinstance(token, Integral) or not 0 <= int(token) < size:
            raise InputError(f"token {index} is {token!r:.60}: tokens of this model are integers from 0 to {size - 1}")
    return [int(token) for token in ids]


def detokenize(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of `ids`, spaces untouched."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def tokenize_after(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` as the continuation of other text.

    Some tokenizers (of the Llama 2 family) put a space before every text, which would be wrong within a text. So `text`
    is tokenized after a line end, unless the two would merge.

    Raises:
        InputError: see `tokenize`.
    """
    return tokenize_after_with_offsets(tokenizer, text)[0]


def tokenize_after_with_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """The same with the characters [start, end) of each token, as `tokenize`."""
    anchor, (ids, offsets) = tokenize(tokenizer, _ANCHOR)[0], tokenize(tokenizer, _ANCHOR + text)
    if ids[: len(anchor)] != anchor:
        return tokenize(tokenizer, text)
    shift = len(_ANCHOR)
    return ids[len(anchor) :], [(start - shift, end - shift) for start, end in offsets[len(anchor) :]]


def spans_of(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of `ids` and the characters [start, end) of each token; tokens that share a character share a span.

    A token's text may depend on the one before it (leading spaces), and its bytes may end inside a character. So
    each group of tokens that ends on a whole character is decoded together with the group before it.
    """
    spans: list[tuple[int, int]] = []
    text = ""
    before = done = 0
    for end in range(1, len(ids) + 1):
        grown = decode(ids[before:end])
        if grown.endswith(REPLACEMENT) and end < len(ids):
            continue
        fresh = grown[len(decode(ids[before:done])) :]
        spans += [(len(text), len(text) + len(fresh))] * (end - done)
        text += fresh
        before, done = done, end
    return text, spans


def split(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> list[TextSegment]:
    """Cut `text` into segments of at most about `window` tokens whose texts concatenate to `text`.

    A cut prefers the last sentence end in the second half of the window, then a line end, a space, any character
    boundary. Each segment is tokenized by itself, so it can come out a token or two longer than `window` where a cut
    changes how its neighbours merge. Linear in the text.
    """
    ids, offsets = tokenize(tokenizer, text)
    if len(ids) <= window:
        return [TextSegment(text, 0, ids, offsets)] if ids else []
    segments: list[TextSegment] = []
    start = 0
    for end in _cuts(text, offsets, window):
        part = text[start:end]
        part_ids, part_offsets = tokenize(tokenizer, part)
        segments.append(TextSegment(part, start, part_ids, [(a + start, b + start) for a, b in part_offsets]))
        start = end
    return segments


def _cuts(text: str, offsets: Sequence[tuple[int, int]], window: int) -> list[int]:
    cuts: list[int] = []
    first = 0
    while len(offsets) - first > window:
        best, best_rank = first + window, -2
        for index in range(first + window, first + window // 2, -1):
            # tokens that share a character (bytes of one emoji) must stay together
            if offsets[index][0] < offsets[index - 1][1]:
                continue
            rank = _rank(text, offsets[index][0])
            if rank > best_rank:
                best, best_rank = index, rank
        if best_rank < -1:
            raise InputError(f"one character near {offsets[first][0]} takes more than {window // 2} tokens")
        cuts.append(offsets[best][0])
        first = best
    return [*cuts, len(text)]


def _rank(text: str, cut: int) -> int:
    """How good a place to cut: 3 after a sentence, 2 at a line end, 1 between words, 0 inside one, -1 inside what is
    shown as one character (combining marks, joined emoji, CRLF)."""
    before, after = text[cut - 1], text[cut]
    if before == "\u200d" or before + after == "\r\n" or unicodedata.category(after) in _CONTINUES:
        return -1
    if before == "\n" or after == "\n":
        return 2
    if after.isspace() or before.isspace():
        head = text[max(0, cut - 8) : cut].rstrip().rstrip(_CLOSERS)
        return 3 if head and head[-1] in _SENTENCE_ENDS else 1
    return 3 if before in "。！？" else 0
