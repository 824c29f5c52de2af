"""Saves memory for activations: recompute them (`recomputed`), or keep them on the host (`offloaded`)."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nugget2d.modeling.cache import AllCollected
from nugget2d.modeling.hooks import find_layers
from nugget2d.modeling.parameters import CopiedParameters, Parameters


@contextmanager
def recomputed(roles: Parameters) -> Iterator[None]:
    """Within the block, every layer of both roles keeps no more than its input, and runs again in the backward pass.

    The memory is kept: a decoder layer that runs again is given the same keys and values of the nuggets, and of the
    encoder's keys and values those of the nuggets stay. (Checkpointing inside transformers drops the cache; a
    checkpoint around a whole pass would not lower the peak, for all of it is there when its backward pass begins.)
    """
    stacks = [find_layers(roles.lm)]
    if isinstance(roles, CopiedParameters):
        stacks.append(find_layers(roles.lm, roles.encoder))
    for layers in stacks:
        for index, layer in enumerate(layers):
            # `forward`, not the call: hooks, which sharding works by, stay outside and run once
            layer.forward = _recomputing(layer.forward, index, roles)
    try:
        yield
    finally:
        for layers in stacks:
            for layer in layers:
                del layer.forward


def _recomputing(forward: Callable[..., Any], index: int, roles: Parameters) -> Callable[..., Any]:
    def run_and_forget(*args: Any, **kwargs: Any) -> Any:
        role = roles.current
        cache = next((one for one in (*args, *kwargs.values()) if isinstance(one, DynamicCache)), None)
        before = None if cache is None else _only_layer(cache, index)
        first = [cache]  # the first run fills the cache itself; later ones find what it found

        def run(*args: Any, **kwargs: Any) -> Any:
            if first:
                return _finished(forward, *_replace(_Absent, first.pop(), args, kwargs))
            again = None if before is None else _only_layer(before, index)
            with roles.role(role):
                return _finished(forward, *_replace(_Absent, again, args, kwargs))

        args, kwargs = _replace(cache, _Absent, args, kwargs)
        output = checkpoint(run, *args, use_reentrant=False, **kwargs)
        if output is _Absent:
            raise AllCollected
        return output

    return run_and_forget


def _finished(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `forward` returns; `_Absent` from the encoder's last layer, which must not leave a checkpoint half done."""
    try:
        return forward(*args, **kwargs)
    except AllCollected:
        return _Absent


class _Absent:
    """Stands for the cache among a layer's arguments, or for the output of a layer that was not finished."""


def _replace(
    old: object, new: object, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with `new` where `old` was."""
    positional = tuple(new if one is old else one for one in args)
    return positional, {name: new if one is old else one for name, one in kwargs.items()}


def _only_layer(cache: DynamicCache, index: int) -> DynamicCache:
    """A copy with the states of one layer, which does not keep those of the others alive."""
    alone = copy.copy(cache)
    alone.layers = [copy.copy(one) if number == index else DynamicLayer() for number, one in enumerate(cache.layers)]
    return alone


def offloaded() -> saved_tensors_hooks:
    """A context in which what is saved for the backward pass waits in the host's memory, pinned on CUDA.

    Weights are saved, too, but stay where they are: they are there anyway, and would be copied at every use.
    """

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor.device, tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
