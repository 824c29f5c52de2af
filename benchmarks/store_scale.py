"""What a store of many memories costs: seconds and peak memory of what is done with it.

    python benchmarks/store_scale.py --records 100000 --out benchmarks/results/store_scale.json

Notes of 40 random words share one tiny memory (knorm), so that nothing is compressed; but each has a file of its own.
Every step runs in a fresh process; the clock starts when it has opened the store, and loaded the model if it needs one.
Each tag belongs to one record in a hundred. The store lies in a temporary folder (TMPDIR): if that is no disk, adding
waits for none.
"""

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.memory.records import MethodRecord
from nugget2d.store import MemoryStore

WORDS = 40  # of a note
TAGS = 100
PAGE = 100


class Cost(NamedTuple):
    """Of a step: the best of some turns."""

    seconds: float
    megabytes: float


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    steps: dict[str, tuple[Callable[..., object], int]] = {
        "list, first page of 100": (first_page, 5),
        "list, last page of 100": (last_page, 5),
        "list by tag, first page of 100": (tagged_page, 5),
        "list, all": (everything, 1),
        "find by the first digits of an id": (matching, 5),
        "search, two words": (search, 2),
        "verify": (verify, 1),
        "gc": (sweep, 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "store")
        costs = {"add, all": fresh(fill, place, options.records)}
        for name, (step, turns) in steps.items():
            costs[name] = fresh(timed, place, step, turns)
        index = (place / "index.db").stat().st_size / 1e6
    results = [
        {"step": name, "seconds": round(cost.seconds, 4), "peak_rss_mb": round(cost.megabytes)}
        for name, cost in costs.items()
    ]
    print(markdown_table(list(results[0]), [[str(value) for value in result.values()] for result in results]))
    write_report(options.out, {"records": options.records, "index_mb": round(index), "results": results})


def fresh(work: Callable[..., Cost], *arguments: object) -> Cost:
    """The result of `work` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def fill(place: Path, count: int) -> Cost:
    """Add so many records."""
    model = Nugget2D.from_pretrained("nano")
    chance = random.Random(0)
    vocabulary = ["".join(chance.choices("abcdefghijklmnoprstuvw", k=chance.randint(3, 9))) for _ in range(20_000)]
    memory = model.compress(" ".join(chance.choices(vocabulary, k=WORDS)), method="knorm", ratio=20, dtype="int8")
    with MemoryStore(place) as store:
        start = time.perf_counter()
        for number in range(count):
            one = replace(memory, method=MethodRecord("knorm", {**memory.method.config, "number": number}))
            text = f"note {number} " + " ".join(chance.choices(vocabulary, k=WORDS - 2))
            store.put(one, name=f"note {number}", tags=[f"tag {number % TAGS}"], text=text)
        seconds = time.perf_counter() - start
    return Cost(seconds, peak())


def timed(place: Path, step: Callable[[MemoryStore], Callable[[], object]], turns: int) -> Cost:
    """The best of some turns."""
    with MemoryStore(place, create=False) as store:
        work, seconds = step(store), []
        for _ in range(turns):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return Cost(min(seconds), peak())


def peak() -> float:
    """Megabytes that this process has had in memory at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# ---- steps: each prepares what is timed ----


def first_page(store: MemoryStore) -> Callable[[], object]:
    """As a server lists."""
    return lambda: store.records(owner="", limit=PAGE)


def last_page(store: MemoryStore) -> Callable[[], object]:
    """After the record before it."""
    before = store.records(owner="", limit=PAGE + 1, newest_first=True)[-1].id
    return lambda: store.records(owner="", limit=PAGE, after=before)


def tagged_page(store: MemoryStore) -> Callable[[], object]:
    """Of one tag."""
    return lambda: store.records(owner="", tag="tag 7", limit=PAGE)


def everything(store: MemoryStore) -> Callable[[], object]:
    """As Python lists."""
    return store.records


def matching(store: MemoryStore) -> Callable[[], object]:
    """As the command line finds a record."""
    return lambda: store.matching("abc")


def search(store: MemoryStore) -> Callable[[], object]:
    """By a word that all records have and one that a single one has; they are indexed before."""
    store.search("note")
    return lambda: store.search("note 1234")


def verify(store: MemoryStore) -> Callable[[], object]:
    """Every record and file."""
    return store.verify


def sweep(store: MemoryStore) -> Callable[[], object]:
    """Nothing is an orphan."""
    return store.gc


if __name__ == "__main__":
    main()
