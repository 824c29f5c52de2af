"""Activations recomputed or offloaded: the same gradients, in less room."""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import tiny
from nugget2d import Nugget2D
from nugget2d.modeling.cache import Nuggets
from nugget2d.training.activations import offloaded, recomputed
from nugget2d.training.objectives import Contexts, continue_loss, lm_loss, reconstruct_loss

pytestmark = pytest.mark.slow

Managers = Callable[[Nugget2D], list[AbstractContextManager[object]]]
CASES = [("llama", "copies"), ("llama", "lora"), ("gpt2", "lora"), ("neox", "lora"), ("gemma3", "copies")]
WAYS: dict[str, Managers] = {
    "recomputed": lambda model: [recomputed(model.parameters_by_role)],
    "offloaded": lambda model: [offloaded()],
    "both": lambda model: [offloaded(), recomputed(model.parameters_by_role)],
}


def loss(model: Nugget2D) -> Tensor:
    """Every pass that training makes: scorer, encoder, decoder with a memory and without."""
    generator, ids = torch.Generator().manual_seed(3), tiny.random_ids(2, 24)
    learned, _ = reconstruct_loss(model, ids[:, :16], [5, 3], "learned", generator)
    random = continue_loss(model, Contexts(ids, 1, 16, [4, 4], "random", generator))
    return learned + random + lm_loss(model, ids)


def gradients(model: Nugget2D, contexts: list[AbstractContextManager[object]]) -> dict[str, Tensor]:
    model.train()
    with ExitStack() as kept:
        for context in contexts:
            kept.enter_context(context)
        value = loss(model)
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradients_stay_the_same(case: tuple[str, str], way: str) -> None:
    plain = gradients(tiny.trained(*case), [])
    model = tiny.trained(*case)
    other = gradients(model, WAYS[way](model))
    assert plain.keys() == other.keys() and any("encoder" in name for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, other[name], atol=1e-5), name
    assert not any("forward" in vars(module) for module in model.modules())


def saved_bytes(contexts: list[AbstractContextManager[object]], model: Nugget2D) -> int:
    """Bytes kept between the passes, weights left out."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # or its place would be taken by the next one
        return tensor

    with ExitStack() as stack:
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        for context in contexts:
            stack.enter_context(context)
        generator = torch.Generator().manual_seed(3)
        reconstruct_loss(model, tiny.random_ids(2, 32), [4, 4], "even", generator)
    return sum(kept.values())


@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
def test_recomputing_keeps_little_more_than_each_layers_input(adapters: str) -> None:
    model = tiny.trained("llama", adapters)
    vocabulary, hidden = model.lm.config.vocab_size, model.lm.config.hidden_size
    plain, recomputing = saved_bytes([], model), saved_bytes([recomputed(model.parameters_by_role)], model)
    head = 2 * 32 * 4 * (2 * vocabulary + 8 * hidden)  # logits, their softmax, the norms before
    layers = 6 * 2 * 32 * 4 * hidden
    assert recomputing < layers + head < plain / 2


def test_of_the_encoders_states_only_nuggets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.trained("llama", "copies")
    states: list[weakref.ref[Tensor]] = []
    encoder_states = model.encoder_states

    def watched(*args: object, **kwargs: object) -> object:
        cache = encoder_states(*args, **kwargs)  # type: ignore[arg-type]
        states.extend(weakref.ref(layer.keys) for layer in cache.layers)  # type: ignore[union-attr]
        return cache

    monkeypatch.setattr(model, "encoder_states", watched)
    with recomputed(model.parameters_by_role):
        value, encoded = reconstruct_loss(model, tiny.random_ids(2, 32), [4, 4], "even", torch.Generator())
    gc.collect()
    assert len(states) == 3 and not any(state() is not None for state in states)
    assert isinstance(encoded.nuggets, Nuggets) and value.requires_grad


def test_offloading_leaves_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    empty_like = torch.empty_like

    def counting(tensor: Tensor, **options: object) -> Tensor:
        copied.append(tensor.data_ptr())
        return empty_like(tensor, **options)  # type: ignore[call-overload]

    layer, states = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    monkeypatch.setattr(torch, "empty_like", counting)
    with offloaded():
        (layer(states) ** 2).sum().backward()
    assert states.data_ptr() in copied and layer.weight.data_ptr() not in copied
