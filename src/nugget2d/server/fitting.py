"""Splits long prompts into a prefix that is compressed and a last part that is read uncompressed."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError
from nugget2d.inference.prompting import Message, around_context, find_contents, render, tokens_without
from nugget2d.text.segmentation import split, tokenize, tokenize_after
from nugget2d.text.special_tokens import Span


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it: the text `prefix` compressed, `ids` uncompressed after it."""

    prefix: str
    ids: list[int]


def fit_text(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, window: int, *, after: bool) -> Prompt:
    """A text of at most `limit` tokens as it is; of a longer one the last half of these, all before it as the prefix.

    Args:
        tokenizer: the model's.
        text: the prompt; special tokens in it are ordinary text.
        limit: how many tokens may be uncompressed.
        window: how many tokens a segment to be compressed has at most.
        after: whether other text comes before it.

    Raises:
        InputError: text that cannot be tokenized.
    """
    ids = tokenize_after(tokenizer, text) if after else tokenize(tokenizer, text)[0]
    if len(ids) <= limit:
        return Prompt("", ids)
    parts = split(tokenizer, text, min(window, limit // 2))  # as finely as the text is cut
    first, kept = len(parts) - 1, len(parts[-1].ids)
    while first > 1 and kept + len(parts[first - 1].ids) <= limit // 2:
        first -= 1
        kept += len(parts[first].ids)
    cut = parts[first].start
    return Prompt(text[:cut], tokenize_after(tokenizer, text[cut:]))


def fit_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    limit: int,
    window: int,
) -> Prompt:
    """The same for a conversation: messages become the prefix, the oldest first, and the chat template stays.

    Args:
        tokenizer: the model's, with a chat template.
        messages: the conversation.
        limit: see `fit_text`.
        window: see `fit_text`.

    Raises:
        InputError: too little of it can be compressed; see also `prompting.render`.
    """
    conversation = render(tokenizer, messages)
    if len(conversation.ids) <= limit:
        return Prompt("", conversation.ids)
    found = find_contents(tokenizer, messages, conversation)
    excess, removed = len(conversation.ids) - limit // 2, list[Span]()
    parts = [
        (start + part.start, start + part.start + len(part.text), len(part.ids))
        for start, end in sorted(span for span in found if span is not None)
        for part in split(tokenizer, conversation.text[start:end], min(window, limit // 2))
    ]
    for start, end, size in parts[:-1]:  # the end of the last message is the question
        if excess <= 0:
            break
        excess -= size
        if removed and removed[-1][1] == start:
            start = removed.pop()[0]
        removed.append((start, end))
    ids = tokens_without(tokenizer, conversation, removed)
    if len(ids) > limit:
        raise InputError(
            f"the prompt is too long for max_context: it has {len(conversation.ids):,} tokens, {limit:,} are read "
            f"uncompressed, and {len(ids):,} of it cannot be compressed (the chat template's own, the last message's "
            "end, and messages that the template changes or repeats); send less"
        )
    return Prompt("\n".join(conversation.text[start:end] for start, end in removed), ids)


def fit_around_context(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], limit: int, prefix_ids: Sequence[int]
) -> Prompt:
    """A conversation whose first user message begins with a context that a memory holds (`chat=True`).

    Args:
        tokenizer: the model's, with a chat template.
        messages: the conversation without that context.
        limit: how many tokens may be uncompressed.
        prefix_ids: the tokens before the context, which the memory holds too.

    Raises:
        InputError: too many tokens; see also `prompting.around_context`.
    """
    ids = around_context(tokenizer, messages, prefix_ids)
    if len(ids) > limit:
        raise InputError(
            f"the prompt is too long for max_context: {len(ids):,} tokens follow the memory, {limit:,} are read; "
            "send less"
        )
    return Prompt("", ids)
