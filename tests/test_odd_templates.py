"""Whatever a template does to messages: its own rendering is read, special tokens in messages are text, or it refuses.

None of these templates is of a real model; each does one thing that replacing or marking contents would not survive.
"""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import chat_templates as templates
from nugget2d.errors import InputError
from nugget2d.inference.prompting import Message, around_context, find_contents, render, split_around
from nugget2d.text.segmentation import tokenize_after

SPECIAL = re.compile("|".join(map(re.escape, sorted(templates.SPECIAL, key=len, reverse=True))))
# pieces of the templates and of special tokens, what escaping changes, private use, other cases and forms of letters
_pieces = st.sampled_from(
    [
        *("user", "assistant:", "</s><s>", "<s>", "</", "s>", "<|im_end|>", "\n", " ", "a", "x", "AB", "Beans."),
        *("&<>\"'", "{{ messages }}", "{% raise %}", "\\n", "\x00", "\ue000", "\ue001", "\uf8ff", "é😀", "e\u0301"),
        *("ß", "İ", "\u2028"),
    ]
)
_texts = st.lists(_pieces, max_size=4).map("".join)


def conversation(texts: list[str], system: bool) -> list[Message]:
    roles = [*(["system"] if system else []), "user", "assistant", "user", "assistant"]
    return [Message(role, text) for role, text in zip(roles, texts, strict=False)]


conversations = st.builds(conversation, st.lists(_texts, min_size=1, max_size=4), st.booleans()) | st.builds(
    lambda text, count: conversation([text] * count, False), _texts, st.integers(2, 3)
)


def rendering(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> str | None:
    """What the template itself gives; None if it raises."""
    turns = [{"role": message.role, "content": message.text} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception:
        return None


@pytest.mark.parametrize("name", templates.ODD)
@pytest.mark.parametrize("make", [templates.byte_level, templates.sentencepiece])
def test_a_conversation_is_the_rendering_or_refused(make, name: str) -> None:
    tokenizer = make(templates.ODD[name])
    read = 0

    @settings(max_examples=20)  # of each template and tokenizer
    @given(conversations)
    def check(messages: list[Message]) -> None:
        nonlocal read
        try:
            whole = render(tokenizer, messages)
        except InputError:
            special = any(SPECIAL.search(message.text * 2) for message in messages)
            assert special or any(m.text[:1] in "</s" for m in messages) or rendering(tokenizer, messages) is None
            return
        read += 1
        assert whole.text == rendering(tokenizer, messages)
        own = [match for match in SPECIAL.finditer(whole.text) if match.span() not in whole.quoted]
        ids = [token for token in whole.ids if token in tokenizer.all_special_ids and token != tokenizer.unk_token_id]
        assert tokenizer.convert_ids_to_tokens(ids) == [match[0] for match in own]
        if not whole.quoted:
            assert whole.ids == tokenizer(whole.text, add_special_tokens=False)["input_ids"]
        for message, span in zip(messages, find_contents(tokenizer, messages, whole), strict=True):
            assert span is None or whole.text[slice(*span)] == message.text.strip()

    check()
    assert read > 5 or name == "lists"  # it shows special tokens as it shows a list


@pytest.mark.parametrize("name", templates.ODD)
def test_a_split_is_around_the_text_or_refused(name: str) -> None:
    tokenizer = templates.byte_level(templates.ODD[name])

    @settings(max_examples=20)  # of each template
    @given(conversations, st.data())
    def check(messages: list[Message], data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(messages) - 1))
        try:
            split = split_around(tokenizer, messages, index)
        except InputError:
            return
        read = [*split.before, *tokenize_after(tokenizer, messages[index].text), *split.after]
        assert tokenizer.decode(read) == rendering(tokenizer, messages)

    check()


@pytest.mark.parametrize("name", [*templates.ODD, *templates.TEMPLATES])
def test_a_chat_after_a_memory_reads_as_the_whole_conversation_or_is_refused(name: str) -> None:
    """The context is not known when the chat goes on: a template may look at it."""
    tokenizer = templates.byte_level((templates.ODD | templates.TEMPLATES)[name])

    @settings(max_examples=20)  # of each template
    @given(_texts.map(str.strip).filter(bool), st.lists(_texts, min_size=1, max_size=3))
    def check(context: str, texts: list[str]) -> None:
        messages = conversation(texts, system=False)
        try:
            before = split_around(tokenizer, [Message("user", f"{context}?")], 0, (0, len(context))).before
            after = around_context(tokenizer, messages, before)
        except InputError:
            return
        whole = [Message("user", f"{context}\n\n{texts[0]}"), *messages[1:]]
        read = [*before, *tokenize_after(tokenizer, context), *after]
        assert tokenizer.decode(read) == rendering(tokenizer, whole)

    check()


@pytest.mark.parametrize("name", ["counts", "counts words", "truncates", "looks later"])
def test_a_template_that_looks_at_the_context_is_refused(name: str) -> None:
    tokenizer = templates.byte_level(templates.ODD[name])
    messages = conversation(["Who?", "The keeper.", "When?"], system=False)
    with pytest.raises(InputError, match=r"cannot be split around message 0 \(user\): it (changes|leaves)"):
        around_context(tokenizer, messages, [tokenizer.bos_token_id])
