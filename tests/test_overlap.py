"""Held-out text that was trained on is found."""

import tiny
from overlap import most_in_one, passages, summary


def test_a_document_is_found_in_another() -> None:
    text, other = tiny.TEXT, "Nothing here is told of lamps, and of the sea there is not a word in all of it. " * 4
    held_out = [passages(one, count=8, length=20) for one in (text, other)]
    assert [len(found) for found in held_out] == [8, 8]
    changed = text.upper().replace(" ", " @-@ ").replace(",", " ,")
    assert most_in_one(held_out, ["Before. " + changed, text[: len(text) // 2]], length=20) == [8, 0]
    assert most_in_one([held_out[0], held_out[0][:3]], [text], length=20) == [8, 3]
    assert 3 <= most_in_one(held_out, [text[: len(text) // 2]], length=20)[0] <= 5
    report = summary("a", [("a", held_out[0]), ("a", held_out[1]), ("b", held_out[1])], [8, 0, 0])
    assert report == {"corpus": "a", "documents": 2, "documents_by_passages_found": {0: 1, 8: 1}}


def test_no_passage_leads_across_a_word_that_was_left_out() -> None:
    assert passages("abc def <unk> ghi jkl mno", count=9, length=6) == ["abcdef", "ghijkl"]
