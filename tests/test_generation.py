"""Where answers end: at the tokenizer's end of text, and at every end token that the LM itself names."""

import pytest

import tiny
from nugget2d import Nugget2D
from nugget2d.text.segmentation import tokenize_after


@pytest.mark.parametrize("listed", [False, True], ids=["one", "several"])
def test_an_answer_ends_at_the_end_tokens_of_the_generation_config(listed: bool) -> None:
    model = tiny.trained("llama", "copies")
    for memory in (None, model.compress(tiny.TEXT[:200], ratio=4)):
        model.lm.generation_config.eos_token_id = 0
        whole = model.generate("The keeper", memory=memory, max_new_tokens=12)
        ids = tokenize_after(model.tokenizer, whole)
        end = next(token for token in ids[3:] if token not in ids[:3])
        model.lm.generation_config.eos_token_id = [end, 0] if listed else end
        shorter = model.generate("The keeper", memory=memory, max_new_tokens=12)
        assert whole.startswith(shorter) and len(shorter) < len(whole)
        assert "".join(model.generate("The keeper", memory=memory, max_new_tokens=12, stream=True)) == shorter


def test_an_end_of_ones_own_replaces_them(llama: Nugget2D) -> None:
    whole = llama.generate("The keeper", max_new_tokens=8)
    ids = tokenize_after(llama.tokenizer, whole)
    end = next(token for token in ids[2:] if token not in ids[:2])
    assert len(llama.generate("The keeper", max_new_tokens=8, eos_token_id=end)) < len(whole)
