"""Distributes the weights of a run over its processes: `Replicas` (DDP) or `Shards` (FSDP2).

Each process computes whole micro-batches of its own, so a loss is what it would be in one process, whatever it is a
mean over; only gradients are averaged. A checkpoint is the same file in any case.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nugget2d.training.processes import Processes

T = TypeVar("T")


class Replicas:
    """Every process has all weights (what DDP does; a plain average is enough where backward passes are few)."""

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        """Move `module` to the device."""
        self.processes = processes
        module.to(processes.device)

    def run(self, work: Callable[[], T]) -> T:
        """What `work`, which uses the module, returns."""
        return work()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """To be called after a step's last backward pass; all processes must have used the same parameters."""
        if self.processes.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
        for gradient, sent in zip(gradients, pending, strict=True):
            sent.wait()
            gradient /= self.processes.count


class Shards:
    """Every process has a part of each weight; a layer is gathered when it runs, and its gradients are averaged.

    torch's `fully_shard`, for each transformer layer but the last and for the rest together, which stays gathered from
    the forward pass to the end of the backward pass. Weights are gathered in the precision
    they are kept in, so that autocast computes what it does in one process.
    """

    def __init__(self, module: nn.Module, processes: Processes, *, keep_layers: bool) -> None:
        """Shard `module` in place, onto the device.

        Args:
            module: the model.
            processes: who gets a part.
            keep_layers: keep gathered layers until the backward pass, for losses that read weights themselves.
        """
        self.processes = processes
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        for layers in [one for one in module.modules() if isinstance(one, nn.ModuleList)]:
            # not the last: the encoder's pass ends within it, and torch gathers by what goes into and out of a layer
            for layer in layers[:-1]:
                fully_shard(layer, mesh=mesh, reshard_after_forward=not keep_layers)
        self._entry = _Entry(module)
        fully_shard(self._entry, mesh=mesh)

    def run(self, work: Callable[[], T]) -> T:
        """See `Replicas.run`; all processes must do the same work, in the same order."""
        return cast(T, self._entry(work))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The backward pass has done so."""


class _Entry(nn.Module):
    """A forward pass that is whatever it is asked to be: losses call several parts of the model, each as they need."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], T]) -> T:
        return work()


Spread = Replicas | Shards


def whole(state: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """A state dict with whole tensors, on the CPU, in the place of shards; tied weights stay one tensor.

    All processes must call it; those that are not the first get None for each shard.
    """
    gathered: dict[int, Tensor | None] = {}

    def gather(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: gather(one) for key, one in value.items()}
        if not isinstance(value, DTensor):
            return value.detach() if isinstance(value, Tensor) else value
        if id(value) not in gathered:
            tensor = cast(DTensor, value.detach()).full_tensor()
            gathered[id(value)] = tensor.cpu() if processes.first else None
        return gathered[id(value)]

    return cast(dict[str, Any], gather(state))


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process keeps of `like`, a tensor of the same shape."""
    if not isinstance(like, DTensor):
        return tensor
    # each process has read the whole tensor: nothing to be sent
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
