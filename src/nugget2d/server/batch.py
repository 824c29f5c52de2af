"""A batch of answers, which get one token each at every step."""

import torch
from torch import Tensor

from nugget2d.modeling.headwise import HeadwiseCache
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.server.batch_cache import BatchCache, RowCache, read
from nugget2d.server.events import Failed
from nugget2d.server.jobs import Generation


class Batch:
    """Generations of one kind; they join when their context was read, and leave when they are done.

    Attributes:
        jobs: whose answers these are, in the order of their rows.
    """

    def __init__(self, model: Network, role: Role, headwise: bool) -> None:
        """Empty; all are read with the weights of `role`, and `headwise` if their heads differ in length."""
        self.jobs: list[Generation] = []
        self._model, self._role = model, role
        self._cache: RowCache = HeadwiseCache() if headwise else BatchCache()

    def join(self, job: Generation) -> None:
        """Take over a job after its `work`."""
        if isinstance(self._cache, HeadwiseCache) and isinstance(job.cache, HeadwiseCache):
            self._cache.add([job.cache.row(0)], job.max_new_tokens)
        elif isinstance(self._cache, BatchCache) and isinstance(job.cache, BatchCache):
            self._cache.add(*job.cache.row(0), job.cache.lengths[0] + job.max_new_tokens)
        job.cache.drop(0)
        self.jobs.append(job)

    def leave(self, job: Generation) -> None:
        """Forget a job."""
        row = self.jobs.index(job)
        self._cache.drop(row)
        last = self.jobs.pop()
        if last is not job:
            self.jobs[row] = last

    def step(self) -> None:
        """One more token for every answer; what fails for one answer fails it alone."""
        model, jobs = self._model, tuple(self.jobs)
        tokens = torch.tensor([[job.token] for job in jobs], device=model.device)
        logits = read(model, self._role, self._cache, model.embed(tokens), [job.position for job in jobs])
        for job, row in zip(jobs, logits, strict=True):
            if not _take(job, row):
                self.leave(job)


def _take(job: Generation, logits: Tensor) -> bool:
    """Give a job its logits (V,); whether it continues."""
    job.position += 1
    try:
        job.take(logits)
    except Exception as error:
        job.emit(Failed(error))
        return False
    return not job.done
