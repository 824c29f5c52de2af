"""Imagined continuations: drawn from the LM as it is, alike in any batch."""

import pytest
import torch

import tiny
from nugget2d.errors import InputError
from nugget2d.inference.continuations import sample_continuations

LENGTHS = (9, 4, 14)
SAMPLES, TOKENS = 3, 5


def texts() -> list[list[int]]:
    return [tiny.random_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize(("kind", "adapters"), tiny.CASES)
@torch.no_grad()
def test_expected_is_what_the_lm_says_after_the_text(kind: str, adapters: str) -> None:
    model = tiny.trained(kind, adapters)
    imagined = sample_continuations(model, texts(), SAMPLES, TOKENS)
    assert imagined.ids.shape == (SAMPLES, len(LENGTHS), TOKENS)
    for row, text in enumerate(texts()):
        for sample in range(SAMPLES):
            ids = torch.tensor([text + imagined.ids[sample, row, :-1].tolist()])
            plain = model.decode(None, ids, prompt=None)[0, len(text) - 1 :].log_softmax(-1)
            torch.testing.assert_close(imagined.expected[sample, row], plain, atol=1e-4, rtol=1e-4)


def test_a_text_gets_its_own_continuations_in_any_batch() -> None:
    model = tiny.trained()
    together = sample_continuations(model, texts(), SAMPLES, TOKENS).ids
    for row, text in enumerate(texts()):
        assert torch.equal(sample_continuations(model, [text], SAMPLES, TOKENS).ids[:, 0], together[:, row])
    assert len(set(map(tuple, together[:, 0].tolist()))) > 1


def test_tokens_come_as_often_as_they_are_likely() -> None:
    model = tiny.make()
    drawn = sample_continuations(model, [texts()[0]], 4000, 1)
    frequency = torch.bincount(drawn.ids.flatten(), minlength=drawn.expected.shape[-1]) / 4000
    likely = drawn.expected[0, 0, 0].exp()
    # four standard deviations of the frequency of the likeliest token
    assert float((frequency - likely).abs().max()) < 4 * float((likely.max() / 4000).sqrt())


def test_no_positions_left() -> None:
    model = tiny.make("gpt2")
    with pytest.raises(InputError, match="positions"):
        sample_continuations(model, [[1] * 1020], 1, 8)
