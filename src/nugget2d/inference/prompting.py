"""What a client sends becomes tokens: chat templates, and prompts too long to be read whole.

Text of clients is text: strings such as "</s>" in it are never special tokens. Those of a chat template are.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError
from nugget2d.text.segmentation import Piece, split, tokenize, tokenize_after

# where the model would go on with the next question by itself
PLAIN_STOP = "\nuser:"


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt; `special` if it comes from a chat template, whose special tokens count as such."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model shall read it: `head` compressed, `ids` whole."""

    head: tuple[Piece, ...]
    ids: list[int]


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[Part], list[str]]:
    """Messages as text that the answer goes on from, and the strings that end it.

    By the tokenizer's chat template, where it has one; else a line `role: text` for every message, then `assistant:`.

    Raises:
        InputError: the template refuses these messages.
    """
    if not tokenizer.chat_template:
        lines = [f"{message.role}: {message.text}\n" for message in messages]
        return [Part("".join(lines) + "assistant:")], [PLAIN_STOP]
    # the template is filled with marks that no client can guess: what it wrote and what they wrote stay apart
    marks = [uuid.uuid4().hex for _ in messages]
    turns = [{"role": message.role, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    try:
        rest = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error
    parts = []
    for message, mark in zip(messages, marks, strict=True):
        before, found, after = rest.partition(mark)
        if found:  # some templates leave system messages out
            parts += [Part(before, special=True), Part(message.text)]
            rest = after
    parts.append(Part(rest, special=True))
    return [part for part in parts if part.text], []


def fit(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part], limit: int, window: int, *, after: bool) -> Prompt:
    """A prompt of at most `limit` whole tokens; of a longer one the last half of these, and a head of all before it.

    Args:
        tokenizer: the model's.
        parts: the prompt.
        limit: how many tokens may be whole.
        window: how many tokens a segment to be compressed has at most.
        after: whether something stands before it.

    Raises:
        InputError: text that cannot be tokenized.
    """
    ids = _tokens(tokenizer, parts, after=after)
    if len(ids) <= limit:
        return Prompt((), ids)
    units: list[tuple[Part, int]] = []  # as finely as the prompt can be cut
    for part in parts:
        if part.special:
            units.append((part, len(_tokens(tokenizer, [part], after=True))))
        else:
            units += [
                (Part(piece.text), len(piece.ids)) for piece in split(tokenizer, part.text, min(window, limit // 2))
            ]
    first, whole = len(units) - 1, units[-1][1]
    while first > 1 and whole + units[first - 1][1] <= limit // 2:
        first -= 1
        whole += units[first][1]
    head = "".join(part.text for part, _ in units[:first])
    tail = [part for part, _ in units[first:]]
    return Prompt(tuple(split(tokenizer, head, window)), _tokens(tokenizer, tail, after=True))


def _tokens(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part], *, after: bool) -> list[int]:
    """Tokens of all parts; neighbours of a kind are one text, for tokens may go across their border."""
    merged: list[Part] = []
    for part in parts:
        if merged and merged[-1].special == part.special:
            merged[-1] = Part(merged[-1].text + part.text, part.special)
        else:
            merged.append(part)
    ids: list[int] = []
    for part in merged:
        if part.special:
            ids += tokenizer(part.text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        elif ids or after:
            ids += tokenize_after(tokenizer, part.text)
        else:
            ids += tokenize(tokenizer, part.text)[0]
    return ids
