"""Answers that are written side by side, a token each at every step."""

import torch

from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.server.jobs import Generation
from nugget2d.server.slots import Slots, read


class Batch:
    """Generations of one role; they join when their context was read, and leave when they are done.

    Attributes:
        jobs: whose answers these are, in the order of their rows.
    """

    def __init__(self, model: Network, role: Role) -> None:
        """Nobody yet."""
        self.jobs: list[Generation] = []
        self._model, self._role = model, role
        self._slots = Slots()

    def join(self, job: Generation) -> None:
        """Take over a job after its `work`."""
        keys, values = job.slots.row(0)
        self._slots.add(keys, values, job.slots.lengths[0] + job.max_new_tokens)
        job.slots.drop(0)
        self.jobs.append(job)

    def leave(self, job: Generation) -> None:
        """Forget a job."""
        row = self.jobs.index(job)
        self._slots.drop(row)
        last = self.jobs.pop()
        if last is not job:
            self.jobs[row] = last

    def step(self) -> None:
        """One more token for every answer."""
        model, jobs = self._model, tuple(self.jobs)
        tokens = torch.tensor([[job.token] for job in jobs], device=model.device)
        logits = read(model, self._role, self._slots, model.embed(tokens), [job.position for job in jobs])
        for job, row in zip(jobs, logits, strict=True):
            job.position += 1
            job.take(row)
            if job.done:
                self.leave(job)
