"""Reads activations of a model through hooks: states of an early layer, inputs of any module."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nugget2d.errors import ModelError


class _Reached(Exception):
    """Ends a forward pass early, and holds the hidden states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def find_layers(lm: PreTrainedModel, body: nn.Module | None = None) -> nn.ModuleList:
    """The list of transformer layers of a causal LM, or of a copy of its `body`.

    Raises:
        ModelError: there is no list of `num_hidden_layers` modules.
    """
    wanted = lm.config.get_text_config(decoder=True).num_hidden_layers
    for module in (body or lm.base_model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ModelError(f"{type(lm).__name__} has no list of its {wanted} layers; it is not a plain decoder")


def hidden_after(body: PreTrainedModel, layers: nn.ModuleList, count: int, ids: Tensor) -> Tensor:
    """(B, n) ids -> (B, n, d) hidden states after the first `count` layers (0: the embeddings).

    Raises:
        ModelError: the model has fewer layers.
    """
    if count > len(layers):
        raise ModelError(f"scorer_layer is {count}, but the model has {len(layers)} layers; lower it")
    if count == 0:
        return body.get_input_embeddings()(ids)

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    hook = layers[count - 1].register_forward_hook(stop)
    try:
        body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise ModelError(f"layer {count - 1} did not run; this architecture skips layers")


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, collect the first input of every call of `module`."""
    caught: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        hook.remove()
