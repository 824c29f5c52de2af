"""The thread that owns the model: continuous batching.

Between two steps of the running answers jobs join and leave, and work that is not shared (reading a prompt, compressing
a text) gets a bounded time. So no request waits for the long text of another, or for a client that reads slowly.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nugget2d.errors import OverloadError, ShutdownError, TimeLimitError
from nugget2d.modeling.headwise import HeadwiseCache
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.server.batch import Batch
from nugget2d.server.events import Failed
from nugget2d.server.jobs import Generation, Job, Work

# Seconds of unshared work between two steps; it ends with the first step that exceeds them.
WORK_SECONDS = 0.05


@dataclass(eq=False)
class _Unshared:
    """A job whose own work is not over, with `left` tokens to go."""

    job: Job
    work: Work
    left: int


class Engine:
    """Runs jobs: so many at a time, so many waiting."""

    def __init__(
        self, model: Network, *, max_num_seqs: int, queue: int, on_step: Callable[[int], None] = lambda answers: None
    ) -> None:
        """Start the thread.

        Args:
            model: used by the engine only, until `close`.
            max_num_seqs: jobs that run side by side.
            queue: jobs that may wait for a sequence slot.
            on_step: called with the number of answers that shared a step.
        """
        self._model, self._max_num_seqs, self._queue, self._on_step = model, max_num_seqs, queue, on_step
        self._waiting: deque[Job] = deque()
        self._unshared: list[_Unshared] = []  # in the order of arrival
        self._batches: dict[tuple[Role, bool], Batch] = {}
        self._turns = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="nugget2d-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs without a sequence slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs that have one."""
        return len(self._unshared) + sum(len(batch.jobs) for batch in self._batches.values())

    def require_room(self) -> None:
        """Check that a job would be taken now.

        Raises:
            OverloadError: as many are waiting as may.
            ShutdownError: the engine was closed.
        """
        if self._closing:
            raise ShutdownError("the server is shutting down; ask another, or later")
        if len(self._waiting) >= self._queue and self.num_running >= self._max_num_seqs:
            raise OverloadError(f"{len(self._waiting)} requests are waiting already; try again later")

    def submit(self, job: Job) -> None:
        """Put a job in the queue; what becomes of it goes to its `emit`.

        Raises:
            OverloadError, ShutdownError: see `require_room`.
        """
        with self._changed:
            self.require_room()
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Fail every job that is not done, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # ---- in the thread ----

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self.num_running)
                if self._closing:
                    break
                self._dismiss()
                self._admit()
            self._work()
            self._step()
        for job in self._jobs():
            job.emit(Failed(ShutdownError("the server was shut down before this was done; ask again")))

    def _jobs(self) -> list[Job]:
        running = [unshared.job for unshared in self._unshared]
        return [*self._waiting, *running, *(job for batch in self._batches.values() for job in batch.jobs)]

    def _dismiss(self) -> None:
        """Drop the jobs that were cancelled, and those that exceeded their time limit."""
        now = time.monotonic()
        for job in self._jobs():
            if not job.cancelled and now < job.deadline:
                continue
            self._drop(job)
            if not job.cancelled:
                job.emit(Failed(TimeLimitError("the request took longer than the server allows; ask for less")))

    def _drop(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
        self._unshared = [unshared for unshared in self._unshared if unshared.job is not job]
        for batch in self._batches.values():
            if job in batch.jobs:
                batch.leave(job)

    def _admit(self) -> None:
        while self._waiting and self.num_running < self._max_num_seqs:
            job = self._waiting.popleft()
            self._unshared.append(_Unshared(job, job.work(self._model), job.size))

    def _work(self) -> None:
        """Work that is not shared: one step of it, and more as long as there is time."""
        end = time.monotonic() + WORK_SECONDS
        while self._unshared:
            # the shortest, so that it does not wait for a long one; every other turn the oldest, so that it gets done
            self._turns += 1
            oldest = self._turns % 2 == 0
            chosen = self._unshared[0] if oldest else min(self._unshared, key=lambda unshared: unshared.left)
            if not self._advance(chosen):
                self._unshared.remove(chosen)
            if time.monotonic() >= end:
                break

    def _advance(self, unshared: _Unshared) -> bool:
        """One step of work; False if it was the last. A job that continues by steps joins those like it."""
        job = unshared.job
        try:
            left = next(unshared.work, None)
            if left is not None:
                unshared.left = left
                return True
            if isinstance(job, Generation) and not job.done:
                kind = job.role, isinstance(job.cache, HeadwiseCache)
                self._batches.setdefault(kind, Batch(self._model, *kind)).join(job)
        except Exception as error:
            job.emit(Failed(error))
        return False

    def _step(self) -> None:
        """A token for every answer."""
        for kind, batch in self._batches.items():
            if not batch.jobs:
                continue
            self._on_step(len(batch.jobs))
            try:
                batch.step()
            except Exception as error:
                for job in batch.jobs:
                    job.emit(Failed(error))
                self._batches[kind] = Batch(self._model, *kind)
