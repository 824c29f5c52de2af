"""Pooled memories: means at one position, by hand; trained further from nuggets, saved, and measured."""

from pathlib import Path

import pytest
import torch

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import ModelError
from nugget2d.modeling.cache import cached_states
from nugget2d.modeling.selection import even_ends
from nugget2d.pooled import PooledMemory
from nugget2d.training.run import train
from test_training import PHASE, small_recipe


@pytest.fixture(scope="module")
def pooled() -> PooledMemory:
    """The weights of `tiny.trained("llama", "copies")`."""
    plain = tiny.trained("llama", "copies")
    model = PooledMemory(tiny.lm(), tiny.tokenizer(), plain.config)
    model.load_state_dict(plain.state_dict())
    return model


def test_a_padded_row_is_the_row_alone(pooled: PooledMemory) -> None:
    ids = tiny.random_ids(2, 20)
    both, alone = pooled.encode(ids, [20, 13], [5, 3]), pooled.encode(ids[1:, :13], [13], [3])
    assert both.index[1, 2:].tolist() == alone.index[0].tolist()
    for name in ("keys", "values"):
        for states, own in zip(getattr(both.nuggets, name), getattr(alone.nuggets, name), strict=True):
            assert torch.allclose(states[1, :, 2:], own[0], atol=1e-5)
            assert not states[1, :, :2].any()


def test_pooling_single_tokens_is_keeping_all(pooled: Nugget2D, llama: Nugget2D) -> None:
    ids = tiny.random_ids(2, 12)
    mine = pooled.encode(ids, [12, 12], [12, 12]).nuggets
    all_states = llama.encode(ids, [12, 12], [12, 12], selection="even").nuggets
    for states, own in zip([*mine.keys, *mine.values], [*all_states.keys, *all_states.values], strict=True):
        assert torch.allclose(states, own, atol=1e-5)


def test_pooled_states_are_means_at_one_position(pooled: Nugget2D) -> None:
    """At layer 0, where keys and values depend on a token and its position alone, computed by hand."""
    ids = tiny.random_ids(1, 10)
    encoded = pooled.encode(ids, [10], [3])
    assert encoded.index[0].tolist() == even_ends(10, 3).tolist() == [2, 6, 9]
    inputs = pooled.embed(ids) + pooled.flag

    def at(token: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = cached_states(pooled.encoder_states(inputs[:, [token]], positions=torch.tensor([[position]])))
        return keys[0][0, :, 0], values[0][0, :, 0]

    for number, (tokens, end) in enumerate([((0, 1, 2), 2), ((3, 4, 5, 6), 6), ((7, 8, 9), 9)]):
        keys, values = zip(*(at(token, end) for token in tokens), strict=True)
        assert torch.allclose(encoded.nuggets.keys[0][0, :, number], torch.stack(keys).mean(0), atol=1e-5)
        assert torch.allclose(encoded.nuggets.values[0][0, :, number], torch.stack(values).mean(0), atol=1e-5)


@pytest.mark.slow
def test_pooled_memory_is_trained_further_and_saved(tmp_path: Path) -> None:
    tiny.trained(adapters="copies", window=16, context=64).save_pretrained(tmp_path / "old")
    alone = {"pretrain": None, "model": None, "tokenizer": None}
    stage = {"init": "old", "memory": "pooled", "tokens": 512, "batch_tokens": 256, "optim": {"lr": 1e-3}}
    path = small_recipe(tmp_path, **alone, compress=stage | {"phases": [PHASE | {"segments": 1}]})
    folder = train(path)
    for cls in (Nugget2D, PooledMemory):
        assert type(cls.from_pretrained(folder / "model")) is PooledMemory
    with pytest.raises(ModelError, match="PooledMemory makes 'pooled'"):
        PooledMemory.from_pretrained(tmp_path / "old")
