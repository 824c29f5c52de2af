"""The arithmetic of training against models that exist."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import tiny
from nugget2d import Nugget2D
from nugget2d.training.activations import recomputed
from nugget2d.training.arithmetic import GIB, SHAPES, Shape, layer_activations, training_cost, training_flops
from nugget2d.training.objectives import reconstruct_loss

TOKENS = 257


def shape_of(model: Nugget2D) -> Shape:
    config = model.lm.config
    return Shape(
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, tied=config.tie_word_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
def test_weights_are_counted_as_they_are(adapters: str) -> None:
    model = tiny.make("llama", adapters)
    shape = shape_of(model)
    cost = training_cost(shape, adapters, tokens=1, ratio=1, checkpoint=False, rank=4)  # type: ignore[arg-type]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    small = sum(p.numel() for p in model.small_parameters()) + 1  # prompts, flag, the scorer's last bias
    assert cost.states == 16 * (trained - small)
    assert cost.weights == 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_named_shapes_have_the_sizes_of_their_names() -> None:
    billions = {name: shape.weights / 1e9 for name, shape in SHAPES.items()}
    assert billions == pytest.approx({"1B": 1.24, "8B": 8.03, "70B": 70.55}, abs=0.01)


def test_activations_of_a_layer_are_what_autograd_keeps() -> None:
    """Two models that differ by one layer, so that everything outside of the layers drops out."""
    kept = [kept_bytes(layers) for layers in (1, 2)]
    shape = Shape(400, 64, 160, 1, 4, 2, 16)
    assert (kept[1] - kept[0]) / TOKENS == pytest.approx(layer_activations(shape), rel=0.1)


def kept_bytes(layers: int) -> int:
    lm = tiny.lm(
        "llama", num_hidden_layers=layers, hidden_size=64, intermediate_size=160, num_key_value_heads=2, head_dim=16
    )
    lm.set_attn_implementation("sdpa")
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() % TOKENS == 0:  # a prime: not weights, nor what autocast makes of them
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        lm(input_ids=tiny.random_ids(1, TOKENS), use_cache=False)
    return sum(kept.values())


def test_more_gpus_carry_more() -> None:
    options = {"tokens": 4096, "ratio": 10.0, "checkpoint": True}
    costs = {name: training_cost(shape, "lora", **options) for name, shape in SHAPES.items()}  # type: ignore[arg-type]
    gpus = [cost.gpus(80 * GIB) for cost in costs.values()]
    assert gpus == sorted(gpus) and gpus[0] == 1
    for cost, number in zip(costs.values(), gpus, strict=True):
        assert cost.per_gpu(number) <= 72 * GIB and (number == 1 or cost.per_gpu(number // 2) > 72 * GIB)
    assert costs["70B"].gpus(20 * GIB) == 0  # what every GPU must have does not fit
    with_all = training_cost(SHAPES["8B"], "lora", tokens=4096, ratio=10.0, checkpoint=False)
    assert with_all.activations > 3 * costs["8B"].activations


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
def test_operations_are_those_that_torch_counts(adapters: str, checkpoint: bool) -> None:
    base = tiny.lm("llama", num_hidden_layers=12, hidden_size=64, intermediate_size=160)
    model = Nugget2D.from_base(base, tiny.tokenizer(), adapters=adapters, lora_rank=1, scorer_layer=1, window=32)
    context = recomputed(model.parameters_by_role) if checkpoint else nullcontext()
    with FlopCounterMode(display=False) as counter, context:
        reconstruct_loss(model, tiny.random_ids(2, 16), [2, 2], "even", torch.Generator())[0].backward()
    # a layer that runs again stops before its last product, the encoder before the end of its last layer
    wanted = training_flops(shape_of(model), adapters, checkpoint=checkpoint)  # type: ignore[arg-type]
    assert counter.get_total_flops() / 32 == pytest.approx(wanted, rel=0.12)
