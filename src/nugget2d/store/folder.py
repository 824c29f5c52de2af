"""A store in a folder: `index.db` (SQLite, write-ahead log) and one safetensors file a memory.

    index.db              records, words, checksums of both
    words.db              an index of the words, made again where it is missing (fulltext.py)
    memories/ab/abcd...   files named by content address; records of several owners may point to one

A memory is written in this order: its file (flushed, renamed into place, folder flushed), then its row, in a
transaction that is flushed when it ends (synchronous=FULL). The row is the acknowledgement: a crash before it leaves a
file without a record, for `sweep`. Files are removed only under SQLite's write lock, and a row is inserted under the
same lock, after a check that its file (still) exists: no order of events leaves a record without its file. The index of
a new store is created under another name and then linked into place.
"""

import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from nugget2d.errors import MemoryFileError, NuggetError, OutputError, StoreError, UnknownMemoryError
from nugget2d.files import atomic_write, sync_folder
from nugget2d.memory.memory import Memory
from nugget2d.store.backend import Damage, Entry, Swept, entry_digest, read_entry, read_record
from nugget2d.store.record import Record

APPLICATION_ID = 0x6E756732  # "nug2": `file index.db` tells what it is
VERSION = 2
BUSY_SECONDS = 60  # another writer's transaction takes milliseconds
ORPHAN_SECONDS = 3600  # between a file and its row there are milliseconds, too

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
PRAGMA journal_mode = WAL;
CREATE TABLE records (
    id TEXT PRIMARY KEY, key TEXT NOT NULL, created TEXT NOT NULL,
    record BLOB NOT NULL, words BLOB NOT NULL, digest BLOB NOT NULL
);
CREATE INDEX records_by_key ON records (key);
CREATE INDEX records_by_age ON records (created, id);
"""


class Folder:
    """See `Backend`; one connection, shared by threads one at a time."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Open the store at `path`; with `create`, make it if there is none.

        Raises:
            StoreError: there is none, it is not a store, of a newer version, or cannot be opened.
        """
        self._index, self._memories = path / "index.db", path / "memories"
        self.words_file: Path | None = path / "words.db"
        self._lock = threading.RLock()
        try:
            made = self._index.is_file()
        except OSError as error:  # such as a name that is too long
            raise StoreError(f"cannot open a store at {path}: {error.strerror}") from error
        if not made:
            if not create:
                raise StoreError(f"there is no store at {path}; `nugget2d store add` creates one")
            self._make()
        with self._errors():
            self._db = self._open()

    def keep(self, entry: Entry, data: bytes) -> Record:
        """See `Backend`."""
        record, path = entry.record, self._path(entry.record.key)
        row = (record.id, record.key, record.created, entry.text, entry.words, entry.digest)
        while True:
            self._write(path, data)
            with self._transaction() as db:
                if not path.is_file():
                    continue  # removed by a sweep before its row was inserted
                if not db.execute("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?)", row).rowcount:
                    (text,) = db.execute("SELECT record FROM records WHERE id = ?", row[:1]).fetchone()
                    record = read_record(record.id, text)
            return record

    def record(self, record_id: str) -> Record | None:
        """See `Backend`."""
        rows = self._rows("SELECT record FROM records WHERE id = ?", record_id)
        return read_record(record_id, rows[0][0]) if rows else None

    def records(self) -> list[Record]:
        """See `Backend`."""
        rows = self._rows("SELECT id, record FROM records ORDER BY created, id")
        return [read_record(record_id, text) for record_id, text in rows]

    def ids(self) -> list[str]:
        """See `Backend`."""
        return [record_id for (record_id,) in self._rows("SELECT id FROM records ORDER BY created, id")]

    def entries(self, ids: Sequence[str]) -> list[Entry | Damage]:
        """See `Backend`."""
        places = ", ".join("?" * len(ids))
        columns = ", ".join(f"CAST({name} AS BLOB)" for name in ("record", "words", "digest"))  # whatever lies there
        rows = self._rows(f"SELECT id, {columns} FROM records WHERE id IN ({places}) ORDER BY created, id", *ids)
        return [read_entry(row[0], str(self._index), *row[1:]) for row in rows]

    def load(self, record: Record, *, verify: bool) -> Memory:
        """See `Backend`; the file is mapped into memory, not read."""
        path = self._path(record.key)
        if not path.is_file():
            if self.record(record.id) is None:
                raise UnknownMemoryError(f"memory {record.id} was removed just now")
            raise StoreError(f"memory {record.id} has lost its file {path}; remove it and add its text again")
        return Memory.map(path, verify=verify)

    def find(self, key: str) -> Memory | None:
        """See `Backend`."""
        try:
            return Memory.map(self._path(key))
        except MemoryFileError:
            return None

    def remove(self, record_id: str) -> bool:
        """See `Backend`."""
        with self._transaction() as db:
            rows = db.execute("DELETE FROM records WHERE id = ? RETURNING key", (record_id,)).fetchall()
        if not rows:
            return False
        # in a separate transaction: a crash in between may leave an orphaned file, but no row without a file
        self._remove_orphan(self._path(rows[0][0]), 0)
        return True

    def verify(self) -> list[Damage]:
        """See `Backend`."""
        problems = [problem for (problem,) in self._rows("PRAGMA integrity_check")]
        damages = [Damage("", str(self._index), problem) for problem in problems if problem != "ok"]
        reasons: dict[str, str | None] = {}  # of each file, read once for all records that point to it
        for record_id, key, text, words, digest in self._rows(
            "SELECT id, key, record, words, digest FROM records ORDER BY created, id"
        ):
            if entry_digest(text, words) != digest:
                damages.append(Damage(record_id, str(self._index), "its record does not match its checksum"))
            if key not in reasons:
                reasons[key] = self._problem(key)
            if (reason := reasons[key]) is not None:
                damages.append(Damage(record_id, str(self._path(key)), reason))
        return damages

    def sweep(self) -> Swept:
        """See `Backend`; partly written files are removed too."""
        sizes = [self._remove_orphan(path, ORPHAN_SECONDS) for path in self._memories.glob("*/*")]
        removed = [size for size in sizes if size is not None]
        return Swept(len(removed), sum(removed))

    def place(self, record: Record) -> str:
        """See `Backend`."""
        return str(self._path(record.key))

    def close(self) -> None:
        """See `Backend`."""
        with self._lock:
            self._db.close()

    def _path(self, key: str) -> Path:
        return self._memories / key[:2] / f"{key}.nugget"

    def _problem(self, key: str) -> str | None:
        try:
            Memory.map(self._path(key))
        except NuggetError as error:
            return str(error)
        return None

    def _write(self, path: Path, data: bytes) -> None:
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                sync_folder(self._memories)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        with atomic_write(path) as file:
            file.write(data)

    def _remove_orphan(self, path: Path, age: float) -> int | None:
        """Remove a file without a record, if it was not written in the last `age` seconds; its size if removed."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM records WHERE key = ?", (path.stem,)).fetchone():
                return None
            try:
                status = path.stat()
                if status.st_mtime > time.time() - age:
                    return None
                path.unlink()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise OutputError(f"cannot remove {path}: {error.strerror or error}") from error
            return status.st_size

    def _rows(self, query: str, *values: str) -> list[tuple]:
        with self._lock, self._errors():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: durable when the block ends, rolled back if it ends by an error."""
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors have rolled it back already
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self._index}: {error}") from error

    def _make(self) -> None:
        """Create an empty index; of two processes at once, the first succeeds and the other uses its index."""
        try:
            new = [folder for folder in (self._memories, *self._memories.parents) if not folder.exists()]
            self._memories.mkdir(parents=True, exist_ok=True)
            for folder in new:  # the name of the store must be durable too
                sync_folder(folder.parent)
            with tempfile.TemporaryDirectory(dir=self._memories, prefix=".new.") as place, self._errors():
                index = Path(place, "index.db")
                db = sqlite3.connect(index, isolation_level=None)
                db.executescript(_SCHEMA)
                db.close()
                with suppress(FileExistsError):
                    self._index.hardlink_to(index)
            sync_folder(self._index.parent)
        except OSError as error:
            raise StoreError(f"cannot make a store at {self._index.parent}: {error.strerror or error}") from error

    def _open(self) -> sqlite3.Connection:
        try:
            db = self._connect("mode=rw")
        except sqlite3.OperationalError:
            # In a read-only folder SQLite cannot share memory with writers. Without a log there is no writer, and the
            # index file is complete.
            if self._index.with_name("index.db-wal").exists():
                raise
            db = self._connect("immutable=1")
        (application,), (version,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        if application != APPLICATION_ID:
            raise StoreError(f"{self._index} is not the index of a store; give another folder")
        if version != VERSION:
            raise StoreError(f"{self._index} has version {version}, this package reads {VERSION}; upgrade it")
        return db

    def _connect(self, mode: str) -> sqlite3.Connection:
        db = sqlite3.connect(
            f"file:{quote(os.fsencode(self._index.absolute()))}?{mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,  # transactions begin and end explicitly
            check_same_thread=False,
        )
        db.execute("PRAGMA synchronous = FULL")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()  # connecting does not read the file
        return db
