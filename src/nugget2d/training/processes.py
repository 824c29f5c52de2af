"""The process group of torchrun, or a single process."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# the first process may be busy for long (it makes the data pack) while the others wait for it
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is, and where it computes."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, and writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The mean of every metric over all processes; all must have the same ones."""
        if self.count == 1:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.count).tolist(), strict=True))


def alone() -> Processes:
    """This process, on the GPU if there is one."""
    return Processes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def together() -> Iterator[Processes]:
    """Within the block, all that torchrun started can exchange tensors; without torchrun, `alone`.

    Each takes the GPU of its number on its machine, or computes on the CPU (gloo). Processes that are together already
    stay so.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield alone()
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    outermost = not dist.is_initialized()
    if outermost:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, device_id=device if cuda else None)
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size())
    finally:
        if outermost:
            dist.destroy_process_group()
