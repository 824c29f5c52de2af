"""Memories of other kinds: what each of them is, by hand and by perturbation, and that they train and are measured."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from nugget2d import Nugget2D
from nugget2d.baselines.part import PartMemory
from nugget2d.baselines.pooled import PooledMemory
from nugget2d.baselines.slots import SlotMemory
from nugget2d.errors import ModelError, RecipeError
from nugget2d.evaluation.held_out import held_out_figures
from nugget2d.modeling.cache import cached_states
from nugget2d.modeling.network import Encoded
from nugget2d.modeling.selection import even_ends
from nugget2d.training.objectives import Contexts, continue_loss, distill_loss, reconstruct_loss
from nugget2d.training.run import fit_recipe, load_recipe, train
from test_training import PHASE, small_recipe

KINDS = {"pooled": PooledMemory, "slots": SlotMemory, "part": PartMemory}


def make(kind: type[Nugget2D], layers: Sequence[int] = (), **options: object) -> Nugget2D:
    """A baseline with the weights of `tiny.trained("llama", "copies")`."""
    plain = tiny.trained("llama", "copies", **options)
    torch.manual_seed(7)
    model = kind(tiny.lm(), tiny.tokenizer(), plain.config)
    if layers:
        model.keep(layers)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"slots"}
    return model


def same(first: Encoded, second: Encoded) -> bool:
    pairs = zip(
        [*first.nuggets.keys, *first.nuggets.values], [*second.nuggets.keys, *second.nuggets.values], strict=True
    )
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.fixture(scope="module")
def pooled() -> Nugget2D:
    return make(PooledMemory)


@pytest.fixture(scope="module")
def slots() -> Nugget2D:
    return make(SlotMemory)


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_padded_row_is_the_row_alone(kind: type[Nugget2D]) -> None:
    model = make(kind, [0, 2] if kind is PartMemory else [])
    ids = tiny.random_ids(2, 20)
    both = model.encode(ids, [20, 13], [5, 3])
    alone = model.encode(ids[1:, :13], [13], [3])
    assert both.index[1, 2:].tolist() == alone.index[0].tolist()
    for states, own in zip(
        [*both.nuggets.keys, *both.nuggets.values], [*alone.nuggets.keys, *alone.nuggets.values], strict=True
    ):
        assert torch.allclose(states[1, :, 2:], own[0], atol=1e-5)
        assert not states[1, :, :2].any()


def test_pooling_single_tokens_is_keeping_all(pooled: Nugget2D, llama: Nugget2D) -> None:
    ids = tiny.random_ids(2, 12)
    assert same(pooled.encode(ids, [12, 12], [12, 12]), llama.encode(ids, [12, 12], [12, 12], selection="even"))


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


def test_slots_are_so_many_as_asked_and_see_the_whole_text(slots: Nugget2D) -> None:
    ids = tiny.random_ids(1, 16)
    for count in (1, 4, 16):
        assert slots.encode(ids, [16], [count]).nuggets.count == count
    before = slots.encode(ids, [16], [4])
    assert before.index[0].tolist() == even_ends(16, 4).tolist()
    ids[0, -1] += 1 if ids[0, -1] < 300 else -1
    after = slots.encode(ids, [16], [4])
    assert not torch.allclose(before.nuggets.values[1][0, :, 0], after.nuggets.values[1][0, :, 0])
    assert torch.equal(
        before.nuggets.values[0], after.nuggets.values[0]
    )  # layer 0: the slot itself, nothing of the text


def test_gradient_reaches_the_slots_in_use_and_no_others(slots: Nugget2D) -> None:
    loss, _ = reconstruct_loss(slots, tiny.random_ids(2, 16), [4, 4], "even", torch.Generator())
    loss.backward()
    assert slots.slots.grad is not None
    assert slots.slots.grad[:4].abs().sum(1).gt(0).all() and not slots.slots.grad[4:].any()
    assert any(parameter is slots.slots for parameter in slots.small_parameters())


@torch.no_grad()
def test_layers_that_are_left_out_carry_nothing(llama: Nugget2D) -> None:
    ids = tiny.random_ids(1, 16)
    whole = llama.encode(ids, [16], [4])
    part = make(PartMemory, [1])
    kept = part.encode(ids, [16], [4])
    for layer, (states, own) in enumerate(zip(kept.nuggets.values, whole.nuggets.values, strict=True)):
        assert torch.equal(states, own) if layer == 1 else not states.any()

    def read() -> torch.Tensor:
        return part.decode(part.encode(ids, [16], [4]).nuggets, ids, prompt="reconstruct")

    before = read()
    last = part.parameters_by_role.encoder.layers[2].self_attn  # of this only layer 2 of a nugget depends
    last.k_proj.weight.mul_(3)
    last.v_proj.weight.mul_(3)
    assert torch.equal(read(), before)
    part.keep([1, 2])
    assert not torch.allclose(read(), before)
    with pytest.raises(ModelError, match="layers 0 to 2"):
        part.keep([3])


def test_pooled_memory_is_trained_further_and_saved(tmp_path: Path) -> None:
    tiny.trained(adapters="copies", window=16, context=64).save_pretrained(tmp_path / "old")
    alone = {"pretrain": None, "model": None, "tokenizer": None}
    stage = {"init": "old", "memory": "pooled", "tokens": 512, "batch_tokens": 256, "optim": {"lr": 1e-3}}
    path = small_recipe(tmp_path, **alone, compress=stage | {"phases": [PHASE | {"segments": 1}]})
    folder = train(path)
    model = PooledMemory.from_pretrained(folder / "model")
    assert type(model) is PooledMemory
    with pytest.raises(ModelError, match="memories of kind 'pooled'"):
        Nugget2D.from_pretrained(folder / "model")
    with pytest.raises(ModelError, match="PooledMemory makes 'pooled'"):
        PooledMemory.from_pretrained(tmp_path / "old")
    path.write_text(path.read_text().replace("pooled", "slots"))
    with pytest.raises(RecipeError, match="cannot go on as `memory: slots`"):
        load_recipe(path)


def test_other_baselines_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="SlotMemory"):
        make(SlotMemory).save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_other_baselines_are_trained_in_studies_only(tmp_path: Path) -> None:
    content = yaml.safe_load(small_recipe(tmp_path).read_text())
    content["compress"]["memory"] = "slots"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=r"`memory: slots`.*studies"):
        train(tmp_path / "tiny.yaml")
    content["compress"] |= {"memory_layers": [1]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="memory_layers"):
        load_recipe(tmp_path / "tiny.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_train_by_every_objective_and_are_measured(tmp_path: Path, kind: str) -> None:
    content = yaml.safe_load(small_recipe(tmp_path, pretrain=None).read_text())
    objectives = {"reconstruct": 3, "uniform": 1, "continue": 1, "distill": 1, "lm": 1}
    content["compress"] |= {"memory": kind, "tokens": 5120, "phases": [PHASE | {"objectives": objectives}]}
    content["compress"] |= {"memory_layers": [1, 2]} if kind == "part" else {}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    model = fit_recipe(load_recipe(path), tmp_path, tmp_path / "run", pack=tmp_path / "run" / "pack")
    assert type(model) is KINDS[kind]
    figures = held_out_figures(model, tiny.random_ids(2, 48) % 300, 32, (4, 20))
    assert len(figures["profile_20x"]) == 16 and 0 <= figures["accuracy_4x"] <= 1


def test_distillation_is_both_divergences_from_the_lm_with_the_whole_context() -> None:
    model = tiny.trained("llama", "copies")
    ids = tiny.random_ids(2, 24)
    loss = distill_loss(model, Contexts(ids, 1, 16, [4, 4], "even", torch.Generator()))
    weight = model.lm.lm_head.weight
    (gradient,) = torch.autograd.grad(loss, weight)

    with torch.no_grad():
        teacher = torch.distributions.Categorical(logits=model.lm(ids).logits[:, 15:-1])
    encoded = model.encode(ids[:, :16], [16, 16], [4, 4], selection="even")
    logits = model.decode(encoded.nuggets, ids[:, 16:-1], prompt="continue", start=16)
    student = torch.distributions.Categorical(logits=logits)
    divergence = torch.distributions.kl_divergence
    wanted = (divergence(teacher, student) + divergence(student, teacher)).mean() / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4) and loss > 0.01
    assert torch.allclose(gradient, torch.autograd.grad(wanted, weight)[0], atol=1e-5)  # none through the teacher


def test_distillation_is_zero_for_a_student_that_predicts_what_its_teacher_does(
    llama: Nugget2D, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny.random_ids(2, 24)
    decode = llama.decode

    def all_seeing(nuggets: object, tokens: torch.Tensor, *, prompt: object, start: int = 0) -> torch.Tensor:
        everything = decode(None, ids[:, :-1], prompt=None)
        return everything[:, -tokens.shape[1] - 1 :] if prompt else everything

    monkeypatch.setattr(llama, "decode", all_seeing)
    contexts = Contexts(ids, 1, 16, [4, 4], "even", torch.Generator())
    assert distill_loss(llama, contexts).item() == pytest.approx(0, abs=1e-6)
    assert continue_loss(llama, contexts) > 1
