"""The engine for one machine: a pool of worker processes with a bounded queue."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context, parent_process

from nugget2d.errors import StoreError
from nugget2d.indexing.documents import Batch, Document, Outcome
from nugget2d.indexing.work import AGAIN, Job, Worker

WAITING = 2  # batches per worker: one in work, one waiting


def run_in_processes(job: Job, batches: Iterable[Batch], workers: int) -> Iterator[list[Outcome]]:
    """Outcomes of batch after batch, as they are done. Batches are read only as fast as they are processed.

    Processes are started by the first batches with documents.

    Raises:
        StoreError: a worker died.
        NuggetError: raised by a worker.
    """
    # spawned, not forked: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_the_parent)
    running: set[Future[list[Outcome]]] = set()
    try:
        for batch in batches:
            if (outcomes := _decided(batch)) is not None:
                yield outcomes
                continue
            running.add(pool.submit(_work, job, batch))
            if len(running) >= WAITING * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise StoreError(f"a worker process was ended (out of memory?); {AGAIN}") from error
    finally:
        pool.shutdown(cancel_futures=True)  # batches in work are finished and stored


def _decided(batch: Batch) -> list[Outcome] | None:
    """The outcomes of a batch without documents."""
    outcomes = [entry for entry in batch if not isinstance(entry, Document)]
    return outcomes if len(outcomes) == len(batch) else None


def _follow_the_parent() -> None:
    """Leave interrupts to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # what is half stored is as after a crash


@cache
def _worker(job: str) -> Worker:
    return Worker(Job.model_validate_json(job))


def _work(job: Job, batch: Batch) -> list[Outcome]:
    return _worker(job.model_dump_json())(batch)
