"""The thread that owns the model: continuous batching.

Between two steps of the running answers jobs join and leave, and work that is not shared (reading a prompt, compressing
a text) gets a bounded time. So no request waits for the long text of another, or for a client that reads slowly.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nugget2d.errors import ShutdownError
from nugget2d.modeling.headwise import HeadwiseCache
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.server.batch import Batch
from nugget2d.server.events import Failed
from nugget2d.server.jobs import Generation, Job, Work, too_late
from nugget2d.server.limits import Places

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
        self,
        model: Network,
        *,
        max_num_seqs: int,
        queue: int,
        several_keys: bool = False,
        max_entries: float = math.inf,
        on_step: Callable[[int], None] = lambda answers: None,
    ) -> None:
        """Start the thread.

        Args:
            model: used by the engine only, until `close`.
            max_num_seqs: jobs that run side by side.
            queue: jobs that may wait for a sequence slot.
            several_keys: whether owners share the places (`Places`).
            max_entries: of all rows of a batch together; all are as long as the longest.
            on_step: called with the number of answers that shared a step.
        """
        self._model, self._max_num_seqs, self._max_entries, self._on_step = model, max_num_seqs, max_entries, on_step
        self._places = Places(max_num_seqs + queue, several_keys=several_keys)
        self._waiting: list[Job] = []  # in the order of arrival
        self._unshared: list[_Unshared] = []  # in the order of arrival
        self._batches: dict[tuple[Role, bool], Batch] = {}
        self._admitted: dict[str, int] = {}  # of each owner: when it last got a slot, as a number
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

    def enter(self, owner: str) -> Callable[[], None]:
        """A place for a job of `owner`, before anything is done for it; what is returned gives it back.

        Raises:
            OverloadError: as many run and wait as may.
            ShutdownError: the engine was closed.
        """
        if self._closing:
            raise ShutdownError("the server is shutting down; ask another, or later")
        return self._places.take(owner)

    def submit(self, job: Job) -> None:
        """Put a job that has a place in the queue; what becomes of it goes to its `emit`.

        Raises:
            ShutdownError: the engine was closed.
        """
        with self._changed:
            if self._closing:
                raise ShutdownError("the server is shutting down; ask another, or later")
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
        return [*self._waiting, *self._running()]

    def _running(self) -> list[Job]:
        shared = (job for batch in self._batches.values() for job in batch.jobs)
        return [*(unshared.job for unshared in self._unshared), *shared]

    def _dismiss(self) -> None:
        """Drop the jobs that were cancelled, and those that exceeded their time limit."""
        now = time.monotonic()
        for job in self._jobs():
            if not job.cancelled and now < job.deadline:
                continue
            self._drop(job)
            if not job.cancelled:
                job.emit(Failed(too_late()))

    def _drop(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
        self._unshared = [unshared for unshared in self._unshared if unshared.job is not job]
        for batch in self._batches.values():
            if job in batch.jobs:
                batch.leave(job)

    def _admit(self) -> None:
        """Give free slots to those who wait: owners take turns, each with its first job."""
        while self._waiting and self.num_running < self._max_num_seqs:
            running = self._running()
            job = min(self._waiting, key=lambda job: self._admitted.get(job.owner, 0))
            rows = 1 << len(running).bit_length()  # as `BatchCache` has them
            entries = rows * max(other.entries for other in [job, *running])
            if running and entries > self._max_entries:
                break  # it is the next, when others have ended
            self._waiting.remove(job)
            self._admitted[job.owner] = max(self._admitted.values(), default=0) + 1
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
