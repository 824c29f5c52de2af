"""Variants in processes of one thread each, so many at a time, with their progress."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from research.studies.study import Variant
from research.studies.variant import last_records

# One thread: a second one beside other work waits more than it computes. The glibc settings keep large buffers from
# going back to the system at every step (LOG.md).
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}
POLL_SECONDS = 0.2


@dataclass
class _Running:
    variant: Variant
    process: subprocess.Popen[bytes]
    output: Path
    line: TaskID


def run_variants(study: Path, out: Path, variants: Sequence[Variant], jobs: int) -> Iterator[tuple[Variant, int, Path]]:
    """Run `variants` of the study file, `jobs` at a time; yields each that ended, its exit status and its output."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    waiting, running = list(variants), list[_Running]()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        whole = bar.add_task(f"{len(variants)} variants", total=len(variants))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(study, out, waiting.pop(0), bar))
                time.sleep(POLL_SECONDS)
                for one in list(running):
                    records = last_records(one.variant.folder(out))
                    bar.update(one.line, completed=sum(record["tokens"] for record in records))
                    if (status := one.process.poll()) is None:
                        continue
                    running.remove(one)
                    bar.remove_task(one.line)
                    bar.advance(whole)
                    yield one.variant, status, one.output
        finally:
            for one in running:  # interrupted: each goes on from its checkpoint next time
                one.process.terminate()
                one.process.wait()


def _start(study: Path, out: Path, variant: Variant, bar: Progress) -> _Running:
    folder = variant.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    command = [sys.executable, "-m", "research.studies.variant", str(study), str(out), variant.name, str(variant.seed)]
    # it imports what this process can
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    return _Running(
        variant, process, output, bar.add_task(f"{variant.name}, seed {variant.seed}", total=variant.tokens)
    )
