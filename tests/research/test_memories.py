"""Memories that only studies train: what each of them is, and that they train and are measured but never saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import ModelError, RecipeError
from nugget2d.evaluation.held_out import held_out_metrics
from nugget2d.modeling.selection import even_ends
from nugget2d.training.objectives import reconstruct_loss
from nugget2d.training.run import fit_recipe, load_recipe, train
from research.memories.appended_tokens import AppendedTokensMemory
from research.memories.layer_subset import LayerSubsetMemory
from test_training import PHASE, small_recipe

pytestmark = pytest.mark.slow

APPENDED: dict[str, Any] = {"use": "research.memories.appended_tokens:AppendedTokens"}
SUBSET: dict[str, Any] = {"use": "research.memories.layer_subset:LayerSubset", "layers": [1, 2]}
KINDS = {"appended": AppendedTokensMemory, "subset": LayerSubsetMemory}


def make(kind: type[Nugget2D], layers: Sequence[int] = (), **options: object) -> Nugget2D:
    """A memory with the weights of `tiny.trained("llama", "copies")`."""
    plain = tiny.trained("llama", "copies", **options)
    torch.manual_seed(7)
    model = kind(tiny.lm(), tiny.tokenizer(), plain.config)
    if layers:
        model.keep(layers)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"memory_tokens"}
    return model


@pytest.fixture(scope="module")
def appended() -> Nugget2D:
    return make(AppendedTokensMemory)


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_padded_row_is_the_row_alone(kind: type[Nugget2D]) -> None:
    model = make(kind, [0, 2] if kind is LayerSubsetMemory else [])
    ids = tiny.random_ids(2, 20)
    both = model.encode(ids, [20, 13], [5, 3])
    alone = model.encode(ids[1:, :13], [13], [3])
    assert both.index[1, 2:].tolist() == alone.index[0].tolist()
    for states, own in zip(
        [*both.nuggets.keys, *both.nuggets.values], [*alone.nuggets.keys, *alone.nuggets.values], strict=True
    ):
        assert torch.allclose(states[1, :, 2:], own[0], atol=1e-5)
        assert not states[1, :, :2].any()


def test_memory_tokens_are_so_many_as_asked_and_see_the_whole_text(appended: Nugget2D) -> None:
    ids = tiny.random_ids(1, 16)
    for count in (1, 4, 16):
        assert appended.encode(ids, [16], [count]).nuggets.count == count
    before = appended.encode(ids, [16], [4])
    assert before.index[0].tolist() == even_ends(16, 4).tolist()
    ids[0, -1] += 1 if ids[0, -1] < 300 else -1
    after = appended.encode(ids, [16], [4])
    assert not torch.allclose(before.nuggets.values[1][0, :, 0], after.nuggets.values[1][0, :, 0])
    assert torch.equal(
        before.nuggets.values[0], after.nuggets.values[0]
    )  # layer 0: the memory token itself, nothing of the text


def test_gradient_reaches_the_memory_tokens_in_use_and_no_others(appended: Nugget2D) -> None:
    loss, _ = reconstruct_loss(appended, tiny.random_ids(2, 16), [4, 4], "even", torch.Generator())
    loss.backward()
    assert appended.memory_tokens.grad is not None
    assert appended.memory_tokens.grad[:4].abs().sum(1).gt(0).all() and not appended.memory_tokens.grad[4:].any()
    assert any(parameter is appended.memory_tokens for parameter in appended.small_parameters())


@torch.no_grad()
def test_layers_that_are_left_out_carry_nothing(llama: Nugget2D) -> None:
    ids = tiny.random_ids(1, 16)
    whole = llama.encode(ids, [16], [4])
    subset = make(LayerSubsetMemory, [1])
    kept = subset.encode(ids, [16], [4])
    for layer, (states, own) in enumerate(zip(kept.nuggets.values, whole.nuggets.values, strict=True)):
        assert torch.equal(states, own) if layer == 1 else not states.any()

    def read() -> torch.Tensor:
        return subset.decode(subset.encode(ids, [16], [4]).nuggets, ids, prompt="reconstruct")

    before = read()
    last = subset.parameters_by_role.encoder.layers[2].self_attn  # of this only layer 2 of a nugget depends
    last.k_proj.weight.mul_(3)
    last.v_proj.weight.mul_(3)
    assert torch.equal(read(), before)
    subset.keep([1, 2])
    assert not torch.allclose(read(), before)
    with pytest.raises(ModelError, match="layers 0 to 2"):
        subset.keep([3])


def with_plugins(folder: Path, *plugins: dict[str, Any], **changes: object) -> Path:
    """A small recipe, changed, its text beside it."""
    path = small_recipe(folder, pretrain=None)
    content = yaml.safe_load(path.read_text())
    content["compress"] |= {"plugins": list(plugins)} | changes
    path.write_text(yaml.safe_dump(content))
    return path


def test_they_are_refused_where_the_result_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="AppendedTokensMemory"):
        make(AppendedTokensMemory).save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match=r"AppendedTokensMemory.*cannot be saved"):
        train(with_plugins(tmp_path, APPENDED))


@pytest.mark.parametrize(
    ("plugins", "changes", "message"),
    [
        ([APPENDED, SUBSET], {}, "AppendedTokens and LayerSubset each bring a memory"),
        ([APPENDED], {"memory": "pooled"}, "remove `compress.memory`"),
        ([SUBSET | {"layers": []}], {}, "LayerSubset'.*`layers`"),
        ([SUBSET | {"layers": [7]}], {}, r"`layers` is \[7\], but the model has layers 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, plugins: list[dict[str, Any]], changes: dict[str, object], message: str
) -> None:
    path = with_plugins(tmp_path, *plugins, **changes)
    with pytest.raises((RecipeError, ModelError), match=message):
        fit_recipe(load_recipe(path), tmp_path, tmp_path / "run", pack=tmp_path / "pack")


@pytest.mark.parametrize(("kind", "plugin"), [("appended", APPENDED), ("subset", SUBSET)])
def test_they_train_by_every_objective_and_are_measured(tmp_path: Path, kind: str, plugin: dict[str, Any]) -> None:
    objectives = {"reconstruct": 3, "uniform": 1, "continue": 1, "distill": 1, "lm": 1}
    path = with_plugins(tmp_path, plugin, tokens=5120, phases=[PHASE | {"objectives": objectives}])
    model = fit_recipe(load_recipe(path), tmp_path, tmp_path / "run", pack=tmp_path / "run" / "pack")
    assert type(model) is KINDS[kind]
    metrics = held_out_metrics(model, tiny.random_ids(2, 48) % 300, 32, (4, 20))
    assert len(metrics["profile_20x"]) == 16 and 0 <= metrics["accuracy_4x"] <= 1
