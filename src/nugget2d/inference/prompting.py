"""Chat templates: messages to the tokens of the tokenizer's own template, with special tokens in messages as text.

The messages are rendered as they are, and the model reads this rendering. A string such as "</s>" in a message would
become a special token in it. A second rendering, with private-use characters in place of such strings, tells which
special tokens come from messages; the model does not read it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NoReturn, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError
from nugget2d.text.segmentation import require_utf8
from nugget2d.text.special_tokens import Span, SpecialTokens, tokenize_part, unused_character

# without a template, where the model would continue with the next question by itself
PLAIN_STOP = "\nuser:"
# For a context that is not known here: long, so that a template that looks at it treats it otherwise than a mark.
_STAND_IN = "something longer " * 80 + "x"
# raised by a template itself, and by its expressions on messages that it does not expect
_REFUSALS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages as the model reads them, up to where the answer begins.

    Attributes:
        text: the rendering.
        ids: its tokens, complete: the start token is among them where there is one.
        quoted: parts of `text`, in order, that look like special tokens but are text of a message.
        stop: strings that end the answer.
    """

    text: str
    ids: list[int]
    quoted: tuple[Span, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """A conversation around one part of it: the tokens `before` and `after` that part."""

    before: list[int]
    after: list[int]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Conversation:
    """Messages as text and tokens that the answer continues.

    With a chat template, `ids` are those of `tokenizer.apply_chat_template(..., add_generation_prompt=True)`, except
    that special tokens written out in a message are ordinary text. Without one, a line `role: text` stands for every
    message, then `assistant:`, all after the start token, and special tokens in it are ordinary text.

    Raises:
        InputError: the template refuses these messages, or looks at special tokens in them; a text has a lone
            surrogate.
    """
    for message in messages:
        require_utf8(message.text)
    text = _rendering(tokenizer, messages)
    if not tokenizer.chat_template:
        quoted: tuple[Span, ...] = ((0, len(text)),)
        return Conversation(text, _tokens(tokenizer, text, quoted, 0, len(text)), quoted, (PLAIN_STOP,))
    quoted = _quoted(tokenizer, messages, text)
    return Conversation(text, _tokens(tokenizer, text, quoted, 0, len(text)), quoted)


def split_around(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, part: Span | None = None
) -> Split:
    """The tokens before and after the text of message `index`, for a model that reads this text compressed.

    The text before, the part and the text after are together exactly the rendering of these messages.

    Args:
        tokenizer: the model's.
        messages: the conversation, the part in its place.
        index: the message.
        part: characters of its text that are compressed; None takes all of it.

    Raises:
        InputError: as `render`; the template does not show the part once and unchanged.
    """
    whole, message = render(tokenizer, messages), messages[index]
    first, last = part or (0, len(message.text))
    content, mark = message.text[first:last], unused_character(whole.text)
    marked = replace(message, text=message.text[:first] + mark + message.text[last:])
    before, *after = _rendering(tokenizer, [*messages[:index], marked, *messages[index + 1 :]]).split(mark)
    if len(after) != 1 or before + content + after[0] != whole.text:
        _refuse_split(message, index, len(after))
    end = len(before) + len(content)
    return Split(
        _tokens(tokenizer, whole.text, whole.quoted, 0, len(before)),
        _tokens(tokenizer, whole.text, whole.quoted, end, len(whole.text)),
    )


def around_context(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prefix_ids: Sequence[int]
) -> list[int]:
    """The tokens after a context that stands, compressed, at the start of the first user message.

    Args:
        tokenizer: the model's.
        messages: the conversation without the context; an empty line separates the two.
        prefix_ids: the tokens before the context that its memory holds (`KVPayload.prefix_ids`, with `chat=True`).

    Raises:
        InputError: as `split_around`; there is no user message, or the template puts other tokens before it.
    """
    index = next((index for index, message in enumerate(messages) if message.role == "user"), None)
    if index is None:
        raise InputError("a memory made with chat=True belongs into a user message; send one")
    # whatever stands for the context here, the tokens around it are the same
    asked = replace(messages[index], text=f"{_STAND_IN}\n\n{messages[index].text}")
    split = split_around(tokenizer, [*messages[:index], asked, *messages[index + 1 :]], index, (0, len(_STAND_IN)))
    if split.before != list(prefix_ids):
        raise InputError(
            "the memory was made for a conversation that begins otherwise (another system message, or none, or another "
            "date in the chat template); leave the system message out, or compress the text again"
        )
    return split.after


def find_contents(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], conversation: Conversation
) -> list[Span | None]:
    """Where each message's text is in the rendering, without whitespace at its ends.

    None for a message that is empty, left out, shown twice or changed; where one is changed, for all of its role.
    """
    spans: list[Span | None] = [None] * len(messages)
    for role in {message.role for message in messages}:  # templates treat messages of a role alike
        members = [index for index, message in enumerate(messages) if message.role == role]
        for index, span in _find(tokenizer, messages, members, conversation.text).items():
            spans[index] = span
    return spans


def tokens_without(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, removed: Sequence[Span]
) -> list[int]:
    """The tokens of a conversation without some parts of its text (in order, not overlapping)."""
    text, quoted = conversation.text, conversation.quoted
    starts, ends = [0, *(end for _, end in removed)], [*(start for start, _ in removed), len(text)]
    kept = zip(starts, ends, strict=True)
    return [token for start, end in kept for token in _tokens(tokenizer, text, quoted, start, end)]


def stop_tokens(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of the generation_config, the tokenizer's, the template's end of a turn.

    Args:
        generation_config: the LM's; its `eos_token_id` is a number, several, or None.
        tokenizer: the LM's.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    tokens = {*(listed if isinstance(listed, (list, tuple)) else [listed]), tokenizer.eos_token_id}
    return frozenset({*tokens, _end_of_turn(tokenizer)} - {None})


def plain_text(messages: Sequence[Message]) -> str:
    """Messages where there is no chat template: a line `role: text` for each, then `assistant:`."""
    return "".join(f"{message.role}: {message.text}\n" for message in messages) + "assistant:"


def _rendering(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: bool = True) -> str:
    if not tokenizer.chat_template:
        return plain_text(messages)
    turns = [{"role": message.role, "content": message.text} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
    except _REFUSALS as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, quoted: Sequence[Span], start: int, end: int) -> list[int]:
    """The tokens of `text[start:end]` of a rendering."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    plain = start == 0 and not tokenizer.chat_template and first is not None  # a template writes its own
    return [*([first] if plain else []), *tokenize_part(tokenizer, text, start, end, quoted)]


def _quoted(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str) -> tuple[Span, ...]:
    """Strings of special tokens in the rendering `text` that are, in whole or in part, text of a message."""
    special = SpecialTokens(tokenizer)
    mark = unused_character(text + "".join(message.text for message in messages))
    masked = [replace(message, text=special.mask(message.text, mark)) for message in messages]
    if masked == list(messages):
        return ()
    other = _rendering(tokenizer, masked)
    if re.sub(f"{mark}+", lambda match: text[slice(*match.span())], other) != text:
        raise InputError(
            "a message holds the string of a special token, and the model's chat template looks at it, so that it "
            f"cannot be kept as text; leave such strings out ({', '.join(special.strings[:4])}, ...)"
        )
    return special.find(text, other, mark)


def _find(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], members: Sequence[int], text: str
) -> dict[int, Span]:
    """Where the messages `members` are that the rendering `text` shows once; none if one is changed."""
    mark = unused_character(text + "".join(message.text for message in messages))
    cores = {index: messages[index].text.strip() for index in members}
    marked = list(messages)
    for index, core in cores.items():
        if core:  # whitespace around it stays: templates trim
            marked[index] = replace(messages[index], text=messages[index].text.replace(core, f"{mark}{index}{mark}", 1))
    try:
        parts = re.split(f"{mark}([0-9]+){mark}", _rendering(tokenizer, marked))
    except InputError:  # its result depends on the contents
        return {}
    shown = [int(index) for index in parts[1::2]]
    parts[1::2] = [cores[index] for index in shown]
    if "".join(parts) != text:
        return {}
    ends = list(accumulate(map(len, parts)))
    spans, times = zip(shown, ends[0::2], ends[1::2], strict=False), Counter(shown)
    return {index: (start, end) for index, start, end in spans if times[index] == 1}


def _refuse_split(message: Message, index: int, shown: int) -> NoReturn:
    how = {0: "leaves it out", 1: "changes it or what stands around it"}.get(shown, f"shows it {shown} times")
    raise InputError(
        f"the model's chat template cannot be split around message {index} ({message.role}): it {how}; "
        "give this text uncompressed"
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template puts right after the assistant's text; None if there is none."""
    if not tokenizer.chat_template:
        return None
    mark = unused_character("")
    try:
        text = _rendering(tokenizer, [Message("user", "a"), Message("assistant", mark)], prompt=False)
    except InputError:
        return None
    after = text.rpartition(mark)[2].lstrip()
    token = next((token for token in SpecialTokens(tokenizer).strings if after.startswith(token)), None)
    return None if token is None else cast(int, tokenizer.convert_tokens_to_ids(token))
