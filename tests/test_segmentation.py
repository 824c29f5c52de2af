"""Cutting long texts: nothing lost, cut where a reader would, in linear time."""

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nugget2d.errors import InputError
from nugget2d.text.segmentation import detokenize, split, tokenize

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400)
FAMILY = "👩‍👩‍👧‍👦"


@given(text=ANY_TEXT, window=st.integers(16, 64))
def test_pieces_tile_the_text(text: str, window: int) -> None:
    segments = split(tiny.tokenizer(), text, window)
    assert "".join(segment.text for segment in segments) == text
    start = 0
    for segment in segments:
        assert segment.start == start
        start += len(segment.text)
        assert 1 <= len(segment.ids) <= window + 3
        assert detokenize(tiny.tokenizer(), segment.ids) == segment.text
        assert all(segment.start <= a <= b <= start for a, b in segment.offsets)
        assert segment.offsets[-1][1] == start


def test_cuts_prefer_sentence_ends_then_lines_then_spaces() -> None:
    window = 40
    for segment in split(tiny.tokenizer(), tiny.TEXT, window)[:-1]:
        ends_sentence = segment.text.rstrip().rstrip('"').endswith((".", "?", "!"))
        assert ends_sentence or segment.text[-1].isspace() or tiny.TEXT[segment.start + len(segment.text)].isspace()
    segments = split(tiny.tokenizer(), "Alpha beta gamma. " * 40, window)
    assert all(segment.text.rstrip().endswith(".") for segment in segments)
    lines = split(tiny.tokenizer(), "alpha beta gamma\n" * 40, window)
    assert all(segment.text.strip("\n").startswith("alpha") for segment in lines)


@pytest.mark.parametrize("unit", ["😀", FAMILY, "é", "👍🏽", "\r\n", "ü"])
def test_what_is_shown_as_one_character_stays_whole(unit: str) -> None:
    if len(tokenize(tiny.tokenizer(), unit)[0]) > 28:
        pytest.skip("longer than half a window in this tokenizer")
    for segment in split(tiny.tokenizer(), unit * 60, 64):
        assert len(segment.text) % len(unit) == 0, unicodedata.name(unit[0], "?")


def test_one_character_too_wide_for_the_window_is_refused() -> None:
    with pytest.raises(InputError, match="tokens"):
        split(tiny.tokenizer(), "🫖" * 10, 3)


@pytest.mark.slow
def test_time_is_linear() -> None:
    def seconds(size: int) -> float:
        text = (tiny.TEXT * (size // len(tiny.TEXT) + 1))[:size]
        start = time.process_time()
        split(tiny.tokenizer(), text, 512)
        return time.process_time() - start

    seconds(10_000)
    small, large = min(seconds(125_000) for _ in range(2)), seconds(1_000_000)
    assert large < 8 * small * 2.5  # twice the linear time is allowed for a busy machine
    assert large < 15


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InputError, match="surrogate at character 3"):
        tokenize(tiny.tokenizer(), "abc\ud800")


def test_special_strings_are_ordinary_text() -> None:
    ids, _ = tokenize(tiny.tokenizer(), f"a {tiny.END} b")
    assert tiny.tokenizer().eos_token_id not in ids
    assert detokenize(tiny.tokenizer(), ids) == f"a {tiny.END} b"
