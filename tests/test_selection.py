"""Which tokens become nuggets, and how many."""

from itertools import pairwise
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nugget2d.errors import InputError
from nugget2d.modeling.selection import POLICIES, SCORED, count_nuggets, even_ends, select

POLICY_NAMES = sorted(POLICIES)
SIZES = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


def choose(name: str, n: int, k: int, seed: int = 0, delimiters: torch.Tensor | None = None, **more) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, n, generator=random)
    marks = torch.rand(1, n, generator=random) < 0.2 if delimiters is None else delimiters[None]
    index, valid = select(name, tiny.random_ids(1, n, seed), [n], [k], scores=scores, delimiters=marks, **more)
    assert valid.all()
    return index[0].tolist()


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(size=SIZES, seed=st.integers(0, 2**31))
def test_every_policy_takes_k_in_order_and_the_last(name: str, size: tuple[int, int], seed: int) -> None:
    n, k = size
    chosen = choose(name, n, k, seed)
    assert len(chosen) == k
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 0
    assert chosen[-1] == n - 1


@given(size=SIZES)
def test_even_gaps_differ_by_one_at_most(size: tuple[int, int]) -> None:
    n, k = size
    ends = [-1, *even_ends(n, k).tolist()]
    gaps = [b - a for a, b in pairwise(ends)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1
    assert ends[-1] == n - 1


@given(size=SIZES, seed=st.integers(0, 2**31))
def test_window_takes_the_best_of_every_window(size: tuple[int, int], seed: int) -> None:
    n, k = size
    scores = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    index, _ = select("window", tiny.random_ids(1, n), [n], [k], scores=scores[None])
    ends = [-1, *even_ends(n, k).tolist()]
    for window, chosen in enumerate(index[0].tolist()[:-1]):
        stretch = scores[ends[window] + 1 : ends[window + 1] + 1]
        assert chosen == ends[window] + 1 + int(stretch.argmax())


@given(size=SIZES, seed=st.integers(0, 2**31))
def test_learned_takes_the_best_scores(size: tuple[int, int], seed: int) -> None:
    n, k = size
    scores = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    index, _ = select("learned", tiny.random_ids(1, n), [n], [k], scores=scores[None])
    best = sorted(range(n - 1), key=lambda token: -scores[token])[: k - 1]
    assert index[0].tolist() == [*sorted(best), n - 1]


def test_punctuation_takes_delimiters_first() -> None:
    marks = torch.zeros(40, dtype=torch.bool)
    marks[[3, 9, 20, 31]] = True
    assert choose("punctuation", 40, 5, delimiters=marks) == [3, 9, 20, 31, 39]
    assert set(choose("punctuation", 40, 3, delimiters=marks)) <= {3, 9, 20, 31, 39}
    assert {3, 9, 20, 31} <= set(choose("punctuation", 40, 12, delimiters=marks))


def test_punctuation_finds_delimiters_in_text(llama) -> None:
    text = "One, two. Three; four: five! Six"
    memory = llama.compress(text, ratio=llama.ids(text).shape[1] / 6, selection="punctuation")
    assert [text[a:b].strip() for a, b in memory.spans[:-1]] == [",", ".", ";", ":", "!"]


def test_random_is_neither_even_nor_the_same_for_every_text() -> None:
    assert choose("random", 100, 20, seed=1) != choose("even", 100, 20, seed=1)
    assert choose("random", 100, 20, seed=1) != choose("random", 100, 20, seed=2)
    assert choose("random", 100, 20, seed=1) == choose("random", 100, 20, seed=1)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    first, second = (choose("random", 100, 20, generator=generator) for generator in generators)
    assert first != second


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=30), ratio=st.floats(1, 50))
def test_counts_keep_to_the_ratio(lengths: list[int], ratio: float) -> None:
    counts = count_nuggets(lengths, ratio)
    assert all(1 <= count <= length for count, length in zip(counts, lengths, strict=True))
    wanted = ceil(sum(lengths) / ratio)
    if min(lengths) >= ratio:
        assert sum(counts) == wanted
    assert wanted <= sum(counts) <= wanted + len(lengths)


def test_bad_choices_are_refused() -> None:
    ids = tiny.random_ids(1, 5)
    with pytest.raises(InputError, match="unknown selection 'best'"):
        select("best", ids, [5], [2])
    for name in (*SCORED, "punctuation"):
        with pytest.raises(InputError, match="needs"):
            select(name, ids, [5], [2])
    for ratio in (0.5, 0, -3, float("nan")):
        with pytest.raises(InputError, match="ratio"):
            count_nuggets([5], ratio)
