"""One token from logits, whatever the logits and the request's numbers are."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nugget2d import Nugget2D
from nugget2d.errors import InputError, ModelError
from nugget2d.inference.sampling import Sampler

# zero, denormals of float32 and float64, what one division leaves the range by, the largest
TEMPERATURES = [0.0, 5e-324, 1e-310, 1e-46, 1e-40, 1e-38, 1e-6, 1e-5, 0.01, 1.0, 2.0, 1e38, sys.float_info.max]
TOP_PS = [5e-324, 1e-320, 1e-46, 1e-9, 0.5, 1 - 1e-16, 1.0]
SEEDS = [None, 0, -1, 2**63 - 1, -(2**63), 2**64, 10**30]
LOGITS = [0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, math.inf, -math.inf]

extremes = st.tuples(st.sampled_from(TEMPERATURES), st.sampled_from(TOP_PS), st.sampled_from(SEEDS))


@given(extremes, st.lists(st.sampled_from(LOGITS) | st.floats(-50, 50), min_size=1, max_size=20))
def test_a_token_of_the_vocabulary_that_the_logits_allow(
    numbers: tuple[float, float, int | None], row: list[float]
) -> None:
    logits = torch.tensor(row)
    sampler = Sampler(*numbers)
    if max(row) == -math.inf:
        with pytest.raises(ModelError):
            sampler.choose(logits)
        return
    token = sampler.choose(logits)
    assert 0 <= token < len(row) and row[token] > -math.inf
    if max(row) == math.inf:
        assert row[token] == math.inf


@given(st.sampled_from(TEMPERATURES[:7]), st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20))
def test_tiny_temperatures_are_greedy(temperature: float, row: list[float]) -> None:
    logits = torch.tensor(row)
    assert Sampler(temperature).choose(logits) == int(logits.argmax())


@given(st.sampled_from(TOP_PS[:4]), st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20, unique=True))
def test_a_tiny_top_p_is_greedy(top_p: float, row: list[float]) -> None:
    logits = torch.tensor(row)
    assert Sampler(1.0, top_p).choose(logits) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_a_number_is_refused(temperature: float) -> None:
    with pytest.raises(ModelError, match="not a number"):
        Sampler(temperature).choose(torch.tensor([0.0, math.nan, math.inf]))


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf, -5e-324])
def test_temperatures_that_scale_nothing_are_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        Sampler(temperature)


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.1, math.nan])
def test_a_top_p_that_is_no_share_is_refused(top_p: float) -> None:
    with pytest.raises(InputError, match="top_p"):
        Sampler(1.0, top_p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_seed_draws_the_same_again(dtype: torch.dtype) -> None:
    logits = torch.linspace(-1, 1, 50, dtype=dtype)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(1.0, seed=seed)
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def shares(temperature: float, top_p: float) -> list[float]:
        sampler = Sampler(temperature, top_p, seed=1)
        counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(1200)]), minlength=4)
        return (counts / 1200).tolist()

    assert shares(1, 1) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.05)
    assert shares(1, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert shares(1, 0.5)[0] == 1
    assert shares(0.5, 1) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.05)
    assert shares(1e300, 1) == pytest.approx([0.25] * 4, abs=0.05)


def test_a_stream_samples_by_the_same_rule(llama: Nugget2D) -> None:
    def write(temperature: float) -> str:
        return "".join(llama.stream(16, 4).generate("The lamp", max_new_tokens=12, temperature=temperature))

    assert write(1e-46) == write(1e-40) == write(0) != write(2.0)
