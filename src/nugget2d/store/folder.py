"""A store in a folder: `index.db` (SQLite, write-ahead log) and one safetensors file a memory.

    index.db              records, vectors, checksums of both
    memories/ab/abcd...   files named by content address; records of several owners may lead to one

"""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nugget2d.errors import MemoryFileError, NuggetError, OutputError, StoreError
from nugget2d.files import atomic_write, sync_folder
from nugget2d.memory import Memory
from nugget2d.store.backend import Damage, Entry, Swept
from nugget2d.store.record import Record

APPLICATION_ID = 0x6E756732  # "nug2": `file index.db` tells what it is
VERSION = 1
BUSY_SECONDS = 60  # another writer's transaction takes milliseconds
ORPHAN_SECONDS = 3600  # between a file and its row there are milliseconds, too

_SCHEMA = """
CREATE TABLE records (
    id TEXT PRIMARY KEY, key TEXT NOT NULL, created TEXT NOT NULL,
    record TEXT NOT NULL, vectors BLOB NOT NULL, digest BLOB NOT NULL
) WITHOUT ROWID;
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
        self._lock = threading.RLock()
        if not self._index.is_file():
            if not create:
                raise StoreError(f"there is no store at {path}; `nugget2d store add` makes one")
            try:
                self._memories.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"cannot make a store at {path}: {error.strerror or error}") from error
        with self._errors():
            self._db = self._connect()

    def keep(self, entry: Entry, data: bytes) -> Record:
        """See `Backend`."""
        path = self._path(entry.record.key)
        while True:
            self._write(path, data)
            with self._transaction() as db:
                if not path.is_file():
                    continue  # swept since: it had no row yet
                row = (entry.record.id, entry.record.key, entry.record.created, entry.record.model_dump_json())
                db.execute(
                    "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?)", (*row, entry.vectors, entry.digest())
                )
            return self.record(entry.record.id) or entry.record

    def record(self, record_id: str) -> Record | None:
        """See `Backend`."""
        rows = self._rows("SELECT record FROM records WHERE id = ?", record_id)
        return next((Record.model_validate_json(row[0]) for row in rows), None)

    def records(self) -> list[Record]:
        """See `Backend`."""
        return [
            Record.model_validate_json(row[0]) for row in self._rows("SELECT record FROM records ORDER BY created, id")
        ]

    def entries(self) -> Iterator[Entry]:
        """See `Backend`."""
        for record, vectors in self._rows("SELECT record, vectors FROM records ORDER BY created, id"):
            yield Entry(Record.model_validate_json(record), vectors)

    def load(self, record: Record, *, verify: bool) -> Memory:
        """See `Backend`; the file is mapped into memory, not read."""
        path = self._path(record.key)
        if not path.is_file():
            raise StoreError(f"memory {record.id} has lost its file {path}; remove it and add its text again")
        return Memory.map(path, verify=verify)

    def find(self, key: str) -> Memory | None:
        """See `Backend`."""
        try:
            return Memory.map(self._path(key))
        except MemoryFileError:
            return None

    def remove(self, record: Record) -> None:
        """See `Backend`."""
        with self._transaction() as db:
            db.execute("DELETE FROM records WHERE id = ?", (record.id,))
        # not in the same transaction: a crash between must leave a file too many, not a row too many
        self._unlink_orphan(self._path(record.key), 0)

    def verify(self) -> list[Damage]:
        """See `Backend`."""
        damages = []
        for (problem,) in self._rows("PRAGMA integrity_check"):
            if problem != "ok":
                damages.append(Damage("", str(self._index), problem))
        broken: dict[str, str] = {}
        for row_id, key, text, vectors, digest in self._rows(
            "SELECT id, key, record, vectors, digest FROM records ORDER BY created, id"
        ):
            try:
                entry = Entry(Record.model_validate_json(text), vectors)
                if entry.digest() != digest:
                    raise ValueError
            except ValueError:
                damages.append(Damage(row_id, str(self._index), "its record does not match its checksum"))
            try:
                Memory.map(self._path(key))
            except NuggetError as error:
                broken[key] = str(error)
                damages.append(Damage(row_id, str(self._path(key)), str(error)))
        return damages

    def sweep(self) -> Swept:
        """See `Backend`; half-written files too."""
        sizes = [self._unlink_orphan(path, ORPHAN_SECONDS) for path in self._memories.glob("*/*")]
        removed = [size for size in sizes if size is not None]
        return Swept(len(removed), sum(removed))

    def close(self) -> None:
        """See `Backend`."""
        with self._lock:
            self._db.close()

    def _path(self, key: str) -> Path:
        return self._memories / key[:2] / f"{key}.nugget"

    def _write(self, path: Path, data: bytes) -> None:
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                sync_folder(self._memories)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        with atomic_write(path) as file:
            file.write(data)

    def _unlink_orphan(self, path: Path, age: float) -> int | None:
        """Remove a file that no record leads to and that was last written `age` seconds ago; its size if it was one."""
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
            return status.st_size

    def _rows(self, query: str, *values: str) -> list[tuple]:
        with self._lock, self._errors():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock; what was done is durable when the block ends, undone if it ends by an error."""
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors have undone it already
                    self._db.execute("ROLLBACK")
                raise

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._index, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        self._migrate(db)
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Make the tables of a new store; refuse what is not one."""
        db.execute("BEGIN IMMEDIATE")  # two that make the same store
        (version,), (application,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "application_id")
        )
        if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        elif application != APPLICATION_ID:
            raise StoreError(f"{self._index} is no store of memories; give another folder")
        elif version != VERSION:
            raise StoreError(f"{self._index} has version {version}, this package reads {VERSION}; upgrade it")
        db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self._index}: {error}") from error
