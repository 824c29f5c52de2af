"""A real LM answers questions from compressed contexts better than from nothing, and worse than from the text."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest
import torch

from nugget2d import Memory, Nugget2D
from nugget2d.inference.prompting import Message, split_around
from nugget2d.inference.scoring import score_ids
from nugget2d.text.segmentation import tokenize_after
from real_lm import PARAGRAPH, QUESTIONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(smollm2: Path, shared_cache: Path) -> Iterator[Nugget2D]:
    """Converted from its file, then loaded from the folder that came of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUGGET2D_CACHE", str(shared_cache))
        Nugget2D.from_pretrained(smollm2)
        (converted,) = (shared_cache / "gguf").iterdir()
        yield Nugget2D.from_pretrained(converted)


def nats(model: Nugget2D, memory: Memory | None) -> float:
    """Mean over the questions of the nats per token of their answers."""
    return mean(
        model.score(f" {answer}", memory=memory, prompt=f"\nQuestion: {question}\nAnswer:")
        for question, answer in QUESTIONS
    )


def test_answers_lie_between_none_and_full(model: Nugget2D) -> None:
    assert not model.has_compressor
    assert 150 < model.ids(PARAGRAPH).shape[1] < 250
    whole = model.compress(PARAGRAPH, method="knorm", ratio=1)
    none, full = nats(model, None), nats(model, whole)
    assert full < none - 1
    for method in ("knorm", "truncation"):
        memory = model.compress(PARAGRAPH, method=method, ratio=5)
        assert memory.ratio == pytest.approx(5, rel=0.05)
        assert full + 0.5 < nats(model, memory) < none - 0.2
        assert nats(model, memory.to("int8")) == pytest.approx(nats(model, memory), abs=0.03)
    assert nats(model, whole.to("int8")) == pytest.approx(full, abs=0.005)


def test_the_whole_memory_is_the_text(model: Nugget2D) -> None:
    """What is called full in the test above."""
    whole = model.compress(PARAGRAPH, method="truncation", ratio=1)
    (question, answer), form = QUESTIONS[0], "\nQuestion: {}\nAnswer:"
    wanted = model.score(f" {answer}", prompt=PARAGRAPH + form.format(question))
    assert model.score(f" {answer}", memory=whole, prompt=form.format(question)) == pytest.approx(wanted, abs=1e-3)


def test_a_question_through_the_chat_template_is_read_as_one_message(model: Nugget2D) -> None:
    tokenizer, (question, answer) = model.tokenizer, QUESTIONS[0]
    asked = f"{PARAGRAPH}\n{question}"
    after = split_around(tokenizer, [Message("user", asked)], 0, (0, len(PARAGRAPH))).after
    memory = model.compress(PARAGRAPH, method="knorm", ratio=1, chat=True)
    read = [*memory.kv.prefix_ids, *tokenize_after(tokenizer, PARAGRAPH), *after]
    turns = [{"role": "user", "content": asked}]
    assert read == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    target = model.ids_after(answer)
    ids = torch.cat([torch.tensor([read]), target], dim=1)
    with torch.no_grad():
        logits = model.lm(input_ids=ids).logits[0, len(read) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, target[0], reduction="none")
    found = score_ids(model, memory, torch.tensor([after]), target).losses
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_it_says_what_the_text_says(model: Nugget2D) -> None:
    """Greedy, from the whole text and from nothing: else scores might differ for reasons of their own."""
    prompt = "\nQuestion: Who built the observatory?\nAnswer:"
    memory = model.compress(PARAGRAPH, method="truncation", ratio=1)
    assert "Odalys Brennecke" in model.generate(prompt, memory=memory, max_new_tokens=24)
    assert "Brennecke" not in model.generate(prompt, max_new_tokens=24)
