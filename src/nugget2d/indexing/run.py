"""`index`: runs an engine over a corpus, and sums up the outcomes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal

from nugget2d.errors import InputError, StoreError
from nugget2d.indexing.clusters import run_on_cluster
from nugget2d.indexing.documents import Corpus, Failure, count
from nugget2d.indexing.processes import run_in_processes
from nugget2d.indexing.work import Job, Known
from nugget2d.store import MemoryStore

BATCH_CHARS = 32_768  # some 8,000 tokens: what the model encodes at once
EngineName = Literal["process", "ray"]
ENGINES = {"process": run_in_processes, "ray": run_on_cluster}


@dataclass
class Summary:
    """The results of indexing a corpus.

    Attributes:
        added: documents that were compressed.
        known: documents that the store had already, or duplicates.
        failures: the others.
        tokens: of the documents that were added.
        seconds: from start to end, loading the model included.
    """

    added: int = 0
    known: int = 0
    failures: list[Failure] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """All of them."""
        return self.added + self.known + len(self.failures)


def index(
    source: Path,
    job: Job,
    workers: int,
    on_progress: Callable[[int, int], None] | None = None,
    engine: EngineName = "process",
) -> Summary:
    """Add every document of `source` to the job's store; those that it has already are not compressed again.

    What the store has is found out here; if nothing is new, no process is started for it.
    Workers are spawned: a script calls this below `if __name__ == "__main__":`.

    Args:
        source: see `documents`.
        job: how, and where to.
        workers: processes, each with a model of its own.
        on_progress: called with (documents done, documents in all).
        engine: "process", the processes of this machine; or "ray", those of a cluster (`run_on_cluster`).

    Raises:
        InputError: `source` cannot be read or has no documents, or the engine is not installed.
        ModelError, StoreError, OutputError: the model or the store cannot be used; what was done is kept.
    """
    start, total, summary = perf_counter(), count(source), Summary()
    if not total:
        raise InputError(f"there is nothing to index in {source}: no .txt or .md file, or no line of JSON")
    known = None
    try:
        MemoryStore(job.store, create=False).close()
    except StoreError:  # there is none, or it cannot be opened: said here, before workers are started
        MemoryStore(job.store).close()
    else:
        known = Known.to(job)
    for outcomes in ENGINES[engine](job, Corpus(source.absolute(), BATCH_CHARS, known), workers):
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                summary.failures.append(outcome)
            else:
                summary.added += outcome.tokens > 0
                summary.known += outcome.tokens == 0
                summary.tokens += outcome.tokens
        if on_progress is not None:
            on_progress(summary.documents, total)
    summary.seconds = perf_counter() - start
    return summary
