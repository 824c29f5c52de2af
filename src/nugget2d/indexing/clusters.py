"""The engine for clusters: Ray Data streams batches through a pool of actors.

Errors of workers are returned as values: Ray would wrap them into long tracebacks.
"""

import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from nugget2d.errors import InputError, NuggetError, StoreError
from nugget2d.indexing.documents import Batch, Outcome
from nugget2d.indexing.work import AGAIN, Job, Worker

# Defaults: no usage statistics are sent, and only our own progress is shown.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "ERROR", "RAY_BACKEND_LOG_LEVEL": "fatal"}
READ_AHEAD = 2**26  # bytes of batches and results that wait in Ray's object store


def run_on_cluster(job: Job, batches: Iterable[Batch], workers: int) -> Iterator[list[Outcome]]:
    """Outcomes of batch after batch, as they are done. At most `READ_AHEAD` bytes are read ahead.

    The cluster is the one that Ray was initialized with, or that `RAY_ADDRESS` names, or else a local one for the
    duration of the call. The corpus is read on this machine. Every machine needs this package and the model; the store
    is best a bucket: SQLite's write-ahead log is for one machine. Where there are GPUs, each worker has one.

    Args:
        job: how, and where to.
        batches: can be pickled.
        workers: actors, at most; fewer where the cluster has less room.

    Raises:
        InputError: Ray is not installed.
        StoreError: a worker died, or Ray failed.
        NuggetError: raised by reading or by a worker.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("the engine 'ray' needs more packages: pip install 'nugget2d[ray]'") from error

    job = job.from_any_folder()  # actors start in another one
    here = not ray.is_initialized()
    if here:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # bytes: every batch goes to the next free actor
        limit = ray.data.ExecutionResources.for_limits(object_store_memory=READ_AHEAD)
        context.execution_options.resource_limits = limit
        with ray.data.DataContext.current(context):
            read = ray.data.range(1).map_batches(
                _Reader(batches),
                num_cpus=0,  # else it would wait for a core that an actor occupies
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            )
            done = read.map_batches(
                _Actor,
                fn_constructor_args=(job,),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
                num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
                batch_size=1,
            )
        for row in done.iter_rows():
            outcomes = pickle.loads(row["value"])
            if isinstance(outcomes, NuggetError):
                raise outcomes
            yield outcomes
    except ray.exceptions.RayError as error:
        raise StoreError(f"Ray failed: {error}; {AGAIN}") from error
    finally:
        if here:
            ray.shutdown()


class _Reader:
    """The corpus, one row per batch."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __call__(self, rows: object) -> Iterator[dict[str, np.ndarray]]:
        try:
            yield from map(_row, self._batches)
        except NuggetError as error:
            yield _row(error)


class _Actor:
    """A `Worker` with rows as input and output."""

    def __init__(self, job: Job) -> None:
        import ray

        self._job = job
        self._restarted = ray.get_runtime_context().was_current_actor_reconstructed

    @cached_property
    def _worker(self) -> Worker:
        return Worker(self._job)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Ray restarts a dead actor with the same batch: one that ends its process would do so again and again
        if self._restarted:
            return _row(StoreError(f"a worker was ended (out of memory?); {AGAIN}"))
        try:
            batch = pickle.loads(rows["value"].item())
            return _row(batch if isinstance(batch, NuggetError) else self._worker(batch))
        except NuggetError as error:
            return _row(error)


def _row(value: Any) -> dict[str, np.ndarray]:
    """Pickled, as Arrow would turn named tuples into lists."""
    return {"value": np.array([pickle.dumps(value)], dtype=object)}
