"""What a store has acknowledged survives anything: kill -9 at any moment, other writers, a full disk."""

import errno
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import NuggetError, OutputError, StoreError, UnknownMemoryError
from nugget2d.store import MemoryStore

pytestmark = pytest.mark.e2e

ADDS = 200


@pytest.fixture(scope="module")
def memories() -> list[Memory]:
    model = tiny.trained("llama", "copies")
    return model.compress([tiny.TEXT[start : start + 40] for start in range(0, 400, 40)], ratio=4)


class Child:
    """A forked process: importing torch anew would take seconds. It says what it has done through a pipe."""

    def __init__(self, work: Callable[[Callable[[bytes], None]], None]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.close(reader)
                work(lambda line: os.write(writer, line + b"\n"))
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)  # none of pytest's own endings
        os.close(writer)
        self.said = os.fdopen(reader, "rb")

    def join(self) -> int:
        """Its exit status, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def key(number: int) -> str:
    return f"{number:032x}"


def add(folder: Path, memories: list[Memory], numbers: range, say: Callable[[bytes], None]) -> None:
    with MemoryStore(folder) as store:
        for number in numbers:
            record = store.put(memories[number % len(memories)], key=key(number), name=str(number))
            say(record.id.encode())


def age(folder: Path) -> None:
    """As if all files were written long ago."""
    for path in (folder / "memories").rglob("*"):
        os.utime(path, (0, 0))


def test_kill_at_any_moment_loses_nothing_acknowledged(tmp_path: Path, memories: list[Memory]) -> None:
    chance = random.Random(0)
    acknowledged: list[str] = []
    kills = 0
    while len(acknowledged) < ADDS:
        left = range(len(acknowledged), ADDS)
        child = Child(lambda say, left=left: add(tmp_path, memories, left, say))
        for _ in range(chance.randrange(12)):
            acknowledged += [line.decode().strip() for line in [child.said.readline()] if line]
        time.sleep(chance.random() * 0.01)  # an add takes some milliseconds
        os.kill(child.pid, signal.SIGKILL)
        acknowledged += [line.decode().strip() for line in child.said]
        kills += child.join() == -signal.SIGKILL
        # at once: what the next writer does again, it would mend
        with MemoryStore(tmp_path) as store:
            assert store.verify() == []
            assert [record.id for record in store.records()][: len(acknowledged)] == acknowledged
    assert kills > ADDS / 12
    with MemoryStore(tmp_path, create=False) as store:
        records = store.records()
        # the last add of a killed writer may have been done, and not heard of; it was then found again
        assert [record.id for record in records] == acknowledged
        for record in records:
            assert store.get(record.id).checksum == memories[int(record.name) % len(memories)].checksum
        age(tmp_path)
        store.gc()
        assert {path.stem for path in (tmp_path / "memories").rglob("*.*")} == {record.file for record in records}
        assert store.verify() == []


def test_a_store_killed_while_it_is_made_is_no_half_store(tmp_path: Path, memories: list[Memory]) -> None:
    chance = random.Random(1)
    for number in range(20):
        folder = tmp_path / str(number)
        child = Child(lambda say, folder=folder: add(folder, memories, range(1), say))
        time.sleep(chance.random() * 0.02)
        os.kill(child.pid, signal.SIGKILL)
        said = child.said.read()
        child.join()
        with MemoryStore(folder) as store:
            assert store.verify() == []
            assert len(store.records()) >= bool(said)
            store.put(memories[0])


def test_writers_at_once(tmp_path: Path, memories: list[Memory]) -> None:
    """They make the store together, and add the same memories and others."""
    spans = (range(0, 40), range(20, 60))
    children = [Child(lambda say, span=span: add(tmp_path, memories, span, say)) for span in spans]
    said = [child.said.read().split() for child in children]
    assert [child.join() for child in children] == [0, 0]
    assert [len(lines) for lines in said] == [40, 40] and said[0][20:] == said[1][:20]
    with MemoryStore(tmp_path) as store:
        assert sorted(int(record.name) for record in store.records()) == list(range(60))
        assert store.verify() == []


def test_adding_and_removing_the_same_at_once(tmp_path: Path, memories: list[Memory]) -> None:
    """A file goes with its last record, and not while somebody makes it a record again."""
    MemoryStore(tmp_path).close()
    rounds = 100

    def work(say: Callable[[bytes], None], owner: str) -> None:
        with MemoryStore(tmp_path) as store:
            for _ in range(rounds):
                record = store.put(memories[0], key=key(0), owner=owner)
                if store.get(record.id).num_tokens != memories[0].num_tokens:
                    raise AssertionError(owner)
                store.remove(record.id)

    def sweep(say: Callable[[bytes], None]) -> None:
        with MemoryStore(tmp_path) as store:
            for _ in range(rounds):
                for path in (tmp_path / "memories").glob("*/*.nugget"):
                    try:
                        os.utime(path, (0, 0))  # whatever is there is old enough to go
                    except FileNotFoundError:
                        continue
                store.gc()

    children = [Child(lambda say, owner=owner: work(say, owner)) for owner in ("ann", "bob")] + [Child(sweep)]
    assert [child.join() for child in children] == [0, 0, 0]
    with MemoryStore(tmp_path) as store:
        assert store.records() == [] == store.verify()


def test_threads_share_a_store(tmp_path: Path, memories: list[Memory]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with MemoryStore(tmp_path) as store, ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda n: store.put(memories[n % 10], key=key(n % 30)).id, range(60)))
        assert len(set(ids)) == len(store.records()) == 30
        assert store.verify() == []


def test_a_full_disk_loses_nothing_acknowledged(tmp_path: Path, memories: list[Memory]) -> None:
    """Files may not grow beyond a limit: first the index cannot grow any more, then no memory is written at all."""

    def work(say: Callable[[bytes], None]) -> None:
        with MemoryStore(tmp_path) as store:
            store.put(memories[0], key=key(1000))
            for limit in (200_000, 2_000):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                for number in range(limit, limit + ADDS):
                    try:
                        say(store.put(memories[number % 10], key=key(number)).id.encode())
                    except (StoreError, OutputError) as error:
                        say(b"error " + type(error).__name__.encode())
                        break

    child = Child(work)
    lines = [line.decode().strip() for line in child.said]
    assert child.join() == 0
    acknowledged = [line for line in lines if not line.startswith("error")]
    assert [line for line in lines if line.startswith("error")] == ["error StoreError", "error OutputError"]
    assert 0 < len(acknowledged) < ADDS
    with MemoryStore(tmp_path) as store:
        assert store.verify() == []
        assert set(acknowledged) < {record.id for record in store.records()}
        store.put(memories[1])


def test_no_space_for_a_file_is_one_clear_error(tmp_path: Path, llama: Nugget2D, monkeypatch) -> None:
    with MemoryStore(tmp_path) as store:

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OutputError, match="No space left"):
                store.add(llama, "The dog.", ratio=2)
        assert store.records() == [] and not list((tmp_path / "memories").rglob("*.*"))
        assert store.add(llama, "The dog.", ratio=2) == store.records()[0]


def test_a_file_and_its_name_are_flushed_before_the_record(tmp_path: Path, memories: list[Memory], monkeypatch) -> None:
    """kill -9 leaves what the system holds; a power cut does not, so the order of flushes is looked at."""
    with MemoryStore(tmp_path) as store:
        flushed: list[tuple[str, int]] = []
        flush = os.fsync

        def look(handle: int) -> None:
            flush(handle)
            flushed.append((str(Path(f"/proc/self/fd/{handle}").readlink()), len(store.records())))

        monkeypatch.setattr(os, "fsync", look)
        name = store.put(memories[0], key=key(7)).checksum
        folder = tmp_path / "memories" / name[:2]
        assert [name for name, _ in flushed[:1] + flushed[2:]] == [str(folder.parent), str(folder)]
        assert flushed[1][0].startswith(f"{folder}/.nugget2d-")
        assert [records for _, records in flushed] == [0, 0, 0] and len(store.records()) == 1
        assert store._backend._index._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert store._backend._index._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_gc_sweeps_only_what_is_old(tmp_path: Path, memories: list[Memory]) -> None:
    with MemoryStore(tmp_path) as store:
        kept = store.put(memories[0])
        orphan = tmp_path / "memories" / "ab" / f"ab{'0' * 30}.nugget"
        half = orphan.with_name(f".{orphan.name}.x.tmp")
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_bytes(b"12345")
        half.write_bytes(b"123")
        assert store.gc() == (0, 0)
        age(tmp_path)
        assert store.gc() == (2, 8)
        assert store.verify() == [] and store.records() == [kept]


def test_removed_while_read(tmp_path: Path, memories: list[Memory]) -> None:
    with MemoryStore(tmp_path) as store:
        record = store.put(memories[0])
        memory = store.get(record.id, verify=False)
        store.remove(record.id)
        assert memory.checksum == memories[0].checksum
        with pytest.raises(UnknownMemoryError):
            store._backend.load(record, verify=True)
        assert issubclass(UnknownMemoryError, NuggetError)
