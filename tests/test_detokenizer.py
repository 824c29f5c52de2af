"""Text of tokens as they come: whole characters, all of the text, and nothing of a stop string."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import chat_templates as templates
import tiny
from nugget2d.text.detokenizer import IncrementalDetokenizer, StopStrings, Transcript, detokenize_answer
from nugget2d.text.segmentation import REPLACEMENT, tokenize_after

TOKENIZERS = [templates.byte_level(), templates.sentencepiece()]
texts = st.text(alphabet="ab €😀é\n.▁", max_size=30).map(lambda text: text.replace("▁", "  "))


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_pieces_are_whole_characters_and_all_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    @given(texts)
    def check(text: str) -> None:
        ids = tokenize_after(tokenizer, text)
        parts = pieces_of(tokenizer, ids)
        assert "".join(parts) == text == detokenize_answer(tokenizer, ids)
        assert not any(REPLACEMENT in part for part in parts)

    check()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_special_tokens_have_no_text_and_hide_none(tokenizer: PreTrainedTokenizerFast) -> None:
    special = st.sampled_from(tokenizer.all_special_ids[:4])

    @given(st.lists(st.one_of(st.sampled_from([" sea", "é", " "]), special), max_size=8))
    def check(parts: list[str | int]) -> None:
        ids = [
            token for part in parts for token in ([part] if isinstance(part, int) else tokenize_after(tokenizer, part))
        ]
        assert "".join(pieces_of(tokenizer, ids)) == "".join(part for part in parts if isinstance(part, str))

    check()


@given(st.lists(st.integers(0, len(tiny.tokenizer()) - 1), max_size=40))
def test_any_tokens_of_bytes_are_their_text(ids: list[int]) -> None:
    """Bytes that are no character too: those a random model writes."""
    tokenizer = tiny.tokenizer()
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 600), max_size=30))
def test_whole_answers_are_those_that_are_streamed(ids: list[int]) -> None:
    tokenizer = templates.sentencepiece()
    ids = [token for token in ids if token < len(tokenizer)]
    assert "".join(pieces_of(tokenizer, ids)) == detokenize_answer(tokenizer, ids)


def test_text_comes_as_early_as_it_can() -> None:
    tokenizer = templates.byte_level()
    ids = tokenize_after(tokenizer, "a😀b")
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


def test_broken_bytes_do_not_hold_back_what_follows() -> None:
    tokenizer = templates.byte_level()
    first = tokenize_after(tokenizer, "😀")[0]
    detokenizer = IncrementalDetokenizer(tokenizer)
    parts = [detokenizer.push(first) for _ in range(50)]
    assert len("".join(parts)) >= 46
    assert "".join([*parts, detokenizer.finish()]) == REPLACEMENT * 50


def test_a_token_may_end_one_character_and_begin_the_next() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: place for place, letter in enumerate([*alphabet, "¬ð"])}, [("¬", "ð")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    ids = tokenizer.convert_tokens_to_ids(["â", "Ĥ", "¬ð", "Ł", "ĺ", "Ģ"])
    assert "".join(pieces_of(tokenizer, ids)) == "€😀"


def test_an_unfinished_character_at_the_end_is_shown() -> None:
    transcript = Transcript(tiny.tokenizer())
    first = tiny.tokenizer()("😀")["input_ids"][0]
    assert (transcript.push(first), transcript.finish()) == ("", REPLACEMENT)


@given(texts, st.lists(st.text(alphabet="ab €😀", min_size=1, max_size=3), max_size=2))
def test_text_ends_before_a_stop_string(text: str, stops: list[str]) -> None:
    """However tokens cut it."""
    transcript = Transcript(tiny.tokenizer(), stops)
    parts = []
    for token in tiny.tokenizer()(text)["input_ids"] if text else []:
        parts.append(transcript.push(token))
        if transcript.stopped:
            break
    shown = "".join(parts) + transcript.finish()
    if not any(stop in text for stop in stops):
        assert shown == text and not transcript.stopped
    else:
        assert transcript.stopped
        # of two stop strings the one that is complete first counts, unless one token completes both
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_only_what_a_stop_string_could_begin_with_is_held_back() -> None:
    stop = StopStrings(["abc", "bd"])
    assert [stop.push(text) for text in ("xa", "b", "x", "ab", "d", "more")] == ["x", "", "abx", "", "a", ""]
    assert stop.found and stop.finish() == ""
    other = StopStrings(["abc"])
    assert (other.push("ab"), other.finish(), other.found) == ("", "ab", False)
