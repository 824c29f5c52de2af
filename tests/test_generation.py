"""Where answers end: at the tokenizer's end of text, and at every end token that the LM itself names."""

from typing import Any

import pytest

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import InputError


class Recorded:
    """The tokens of every call of transformers' generate."""

    def __init__(self, model: Nugget2D, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[list[int]] = []
        generate = model.lm.generate

        def recording(**arguments: Any) -> Any:
            ids = generate(**arguments)
            self.ids.append(ids[0].tolist())
            return ids

        monkeypatch.setattr(model.lm, "generate", recording)


@pytest.mark.parametrize("listed", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("remembers", [False, True], ids=["text", "memory"])
def test_an_answer_ends_at_the_end_tokens_of_the_generation_config(
    listed: bool, remembers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.trained("llama", "copies")
    memory = model.compress(tiny.TEXT[:200], ratio=4) if remembers else None
    recorded = Recorded(model, monkeypatch)
    whole = model.generate("The keeper", memory=memory, max_new_tokens=12)
    ids = recorded.ids[0]
    end = next(place for place in range(3, 12) if ids[place] not in ids[:place])
    model.lm.generation_config.eos_token_id = [ids[end], 0] if listed else ids[end]
    shorter = model.generate("The keeper", memory=memory, max_new_tokens=12)
    assert recorded.ids[1] == ids[: end + 1]
    assert whole.startswith(shorter[:-1])
    assert "".join(model.generate("The keeper", memory=memory, max_new_tokens=12, stream=True)) == shorter


def test_ends_that_are_asked_for_replace_them(llama: Nugget2D, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(llama, monkeypatch)
    llama.generate("The keeper", max_new_tokens=8)
    ids = recorded.ids[0]
    end = next(place for place in range(2, 8) if ids[place] not in ids[:place])
    llama.generate("The keeper", max_new_tokens=8, eos_token_id=ids[end])
    assert recorded.ids[1] == ids[: end + 1]


@pytest.mark.parametrize("wrong", ["a.nugget", [], 3])
def test_what_is_no_memory_is_named(llama: Nugget2D, wrong: Any) -> None:
    for read in (llama.generate, llama.score):
        with pytest.raises(InputError, match=f"memory is {type(wrong).__name__}, not a Memory"):
            read("The keeper", memory=wrong)
