"""The index of a store in a folder: `index.db`, SQLite with a write-ahead log.

It holds the records as JSON, their words and a checksum of both, and as columns what they are listed and found by:
whose a record is and which file it points to is known without reading it, even if it is damaged.

A new index is made under another name and then renamed into place, one process at a time. An index of version 2, which
had fewer columns, is extended when it is opened; where it cannot be written, a copy in memory is.
"""

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nugget2d.errors import DamageError, StoreError, StoreGoneError
from nugget2d.files import sync_folder
from nugget2d.store.backend import Entry, Wanted, checked_record, damaged, read_record, unknown
from nugget2d.store.record import Record, record_id
from nugget2d.store.sqlite import address, transaction

APPLICATION_ID = 0x6E756732  # "nug2": `file index.db` tells what it is
VERSION = 3
BUSY_SECONDS = 60  # another writer's transaction takes milliseconds

_VERSION_2 = """
CREATE TABLE records (
    id TEXT PRIMARY KEY, key TEXT NOT NULL, created TEXT NOT NULL,
    record BLOB NOT NULL, words BLOB NOT NULL, digest BLOB NOT NULL
);
CREATE INDEX records_by_key ON records (key);
CREATE INDEX records_by_age ON records (created, id);
"""
# statement by statement: in a transaction
_VERSION_3 = (
    "ALTER TABLE records ADD COLUMN owner TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE records ADD COLUMN file TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE records ADD COLUMN nbytes INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX records_by_owner ON records (owner, created, id, nbytes)",
    "CREATE INDEX records_by_file ON records (file)",
    """CREATE TABLE tags (
        id TEXT NOT NULL, tag TEXT NOT NULL, owner TEXT NOT NULL, created TEXT NOT NULL, PRIMARY KEY (id, tag)
    ) WITHOUT ROWID""",
    "CREATE INDEX tags_by_owner ON tags (tag, owner, created, id)",
    "CREATE INDEX tags_by_age ON tags (tag, created, id)",
    f"PRAGMA user_version = {VERSION}",
)


class Row(NamedTuple):
    """A row of the index, as it is."""

    id: str
    key: str
    created: str
    owner: str
    file: str
    nbytes: int
    record: bytes
    words: bytes
    digest: bytes

    @staticmethod
    def of(entry: Entry) -> "Row":
        """The row that holds an entry."""
        record = entry.record
        return Row(*_columns(record), entry.text, entry.words, entry.digest)


def _columns(record: Record) -> tuple[str, str, str, str, str, int]:
    return record.id, record.key, record.created, record.owner, record.file, record.nbytes


class Index:
    """One connection, shared by threads one at a time."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Open `path`; with `create`, make it if there is none.

        Raises:
            StoreError: there is none, it is no index, of a newer version, or cannot be opened.
        """
        self.path = path
        self._lock = threading.RLock()
        try:
            made = path.is_file()
        except OSError as error:  # such as a name that is too long
            raise StoreError(f"cannot open a store at {path.parent}: {error.strerror}") from error
        if not made:
            if not create:
                raise StoreError(f"there is no store at {path.parent}; `nugget2d store add` creates one")
            self._make()
        with self._errors():
            self._identity = self._seen()
            self._db = self._open()

    def rows(self, query: str, *values: str | int) -> list[tuple]:
        """All that a query selects.

        Raises:
            StoreError: the index cannot be read.
            StoreGoneError: see `transaction`.
        """
        with self._lock, self._errors():
            self.require_here()
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: durable when the block ends, rolled back if it ends by an error.

        Raises:
            StoreError: the index cannot be written.
            StoreGoneError: the file that was opened is not at its path any more. SQLite would go on with a file that
                nobody can open again.
        """
        with self._lock, self._errors():
            self.require_here()
            with transaction(self._db):
                yield self._db
            self.require_here()  # after the commit: what is acknowledged is there

    def row(self, record_id: str) -> Row | None:
        """The row of that id, if there is one."""
        return next(map(Row._make, self.rows(f"{_ROWS} WHERE id = ?", record_id)), None)

    def some_rows(self, after: int, count: int) -> list[tuple[int, Row]]:
        """Some rows by number, which a row gets whenever it is written, from the first one after a number."""
        query = f"SELECT rowid, {_COLUMNS} FROM records WHERE rowid > ? ORDER BY rowid LIMIT ?"
        return [(number, Row(*row)) for number, *row in self.rows(query, after, count)]

    def checked(self, row: Row) -> Record:
        """The record of a row, if all that the index holds of it is what was written.

        Raises:
            DamageError: it is not.
        """
        record = checked_record(row.id, row.record, row.words, row.digest)
        tags = {tag for (tag,) in self.rows("SELECT tag FROM tags WHERE id = ?", row.id)}
        if row[:6] != _columns(record) or tags != set(record.tags):
            raise damaged(row.id, "what it is listed by does not match it")
        return record

    def listed(self, wanted: Wanted) -> list[tuple[str, bytes]]:
        """Ids and records, as JSON, that are wanted.

        Raises:
            UnknownMemoryError: there is no record to begin after.
        """
        conditions, values = ["1"], list[str | int]()
        way, beyond = ("DESC", "<") if wanted.newest_first else ("ASC", ">")
        for column in ("tag", "owner"):
            if (value := getattr(wanted, column)) is not None:
                conditions.append(f"listed.{column} = ?")
                values.append(value)
        if wanted.after is not None:
            rows = self.rows("SELECT created, owner FROM records WHERE id = ?", wanted.after)
            if not rows or wanted.owner not in (None, rows[0][1]):
                raise unknown(wanted.after)
            conditions.append(f"(listed.created, listed.id) {beyond} (?, ?)")
            values += [rows[0][0], wanted.after]
        table = "records AS listed" if wanted.tag is None else "tags AS listed JOIN records USING (id)"
        return self.rows(
            f"SELECT listed.id, record FROM {table} WHERE {' AND '.join(conditions)} "
            f"ORDER BY listed.created {way}, listed.id {way} LIMIT ?",
            *values,
            -1 if wanted.limit is None else wanted.limit,
        )

    def require_here(self) -> None:
        """Refuse to go on with a file that is not at its path any more.

        Raises:
            StoreGoneError: so it is.
        """
        if self._seen() != self._identity:
            raise StoreGoneError(
                f"the store at {self.path.parent} was removed, moved or replaced while it was open; open it again"
            )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _seen(self) -> tuple[int, int] | None:
        """Which file is at the path."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error

    # ---- making and opening ----

    def _make(self) -> None:
        """Create an empty index; of two processes at once, the first succeeds and the other uses its index."""
        memories = self.path.parent / "memories"
        try:
            made = [folder for folder in (memories, *memories.parents) if not folder.exists()]
            memories.mkdir(parents=True, exist_ok=True)
            for folder in made:  # the name of the store must be durable too
                sync_folder(folder.parent)
            with self._errors():
                self._make_under(memories / ".lock", memories / ".new")
        except OSError as error:
            raise StoreError(f"cannot make a store at {self.path.parent}: {error.strerror or error}") from error

    def _make_under(self, lock: Path, new: Path) -> None:
        """The lock is SQLite's: it works on every file system that an index works on, and ends with its process."""
        try:
            with closing(sqlite3.connect(lock, BUSY_SECONDS, isolation_level=None)) as held:
                held.execute("BEGIN EXCLUSIVE")
                if not self.path.is_file():
                    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed here
                    new.mkdir()
                    with closing(sqlite3.connect(new / "index.db", isolation_level=None)) as db:
                        db.execute("PRAGMA journal_mode = WAL")
                        db.executescript(f"PRAGMA application_id = {APPLICATION_ID}; {_VERSION_2}")
                        _extend(db)
                    (new / "index.db").replace(self.path)
                    new.rmdir()
                    sync_folder(self.path.parent)
            with suppress(OSError):  # removed already, or, on Windows, still open elsewhere
                lock.unlink()
        except sqlite3.Error:
            # SQLite refuses a lock that was removed while it waited: then there is an index
            if not self.path.is_file():
                raise

    def _open(self) -> sqlite3.Connection:
        try:
            db = self._connect("mode=rw")
        except sqlite3.OperationalError:
            # In a read-only folder SQLite cannot share memory with writers. Without a log there is no writer, and the
            # index file is complete.
            if self.path.with_name("index.db-wal").exists():
                raise
            db = self._connect("immutable=1")
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if application != APPLICATION_ID:
            raise StoreError(f"{self.path} is not the index of a store; give another folder")
        version = _version(db)
        if version not in (2, VERSION):
            raise StoreError(f"{self.path} has version {version}, this package reads {VERSION}; upgrade it")
        if version == VERSION:
            return db
        try:
            _extend(db)
        except sqlite3.OperationalError:  # it cannot be written
            if db.in_transaction:
                db.execute("ROLLBACK")
            copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            db.backup(copy)
            db.close()
            _extend(copy)
            copy.execute("PRAGMA query_only = 1")
            return copy
        return db

    def _connect(self, mode: str) -> sqlite3.Connection:
        db = sqlite3.connect(
            address(self.path, mode),
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,  # transactions begin and end explicitly
            check_same_thread=False,
        )
        db.text_factory = partial(str, encoding="utf-8", errors="replace")  # damaged text holds up no other row
        db.execute("PRAGMA synchronous = FULL")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()  # connecting does not read the file
        return db


# SQLite keeps any type in any column: a damaged one is read as what it should be, and fits no checksum
_TYPES = {"nbytes": "INTEGER", "record": "BLOB", "words": "BLOB", "digest": "BLOB"}
_COLUMNS = ", ".join(f"CAST({name} AS {_TYPES.get(name, 'TEXT')})" for name in Row._fields)
_ROWS = f"SELECT {_COLUMNS} FROM records"


def insert(db: sqlite3.Connection, row: Row) -> None:
    """Add a row, and the tags of its record; one of the same id is replaced."""
    db.execute(f"INSERT OR REPLACE INTO records ({', '.join(Row._fields)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    db.execute("DELETE FROM tags WHERE id = ?", (row.id,))
    _tag(db, read_record(row.id, row.record))


def _tag(db: sqlite3.Connection, record: Record) -> None:
    rows = [(record.id, tag, record.owner, record.created) for tag in dict.fromkeys(record.tags)]
    db.executemany("INSERT INTO tags VALUES (?, ?, ?, ?)", rows)


def _version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def _extend(db: sqlite3.Connection) -> None:
    """From version 2 to this one, unless another process has just done it."""
    db.execute("BEGIN IMMEDIATE")
    if _version(db) != VERSION:
        for statement in _VERSION_3:
            db.execute(statement)
        db.execute("UPDATE records SET file = key")
        unread, owners = [], {""}
        for id, key, text in db.execute("SELECT id, key, record FROM records").fetchall():
            try:
                record = read_record(id, text)
            except DamageError:
                unread.append((id, key))
                continue
            owners.add(record.owner)
            db.execute("UPDATE records SET owner = ?, nbytes = ? WHERE id = ?", (record.owner, record.nbytes, id))
            _tag(db, record)
        for id, key in unread:  # an id proves whose it is
            owner = next((owner for owner in owners if record_id(key, owner) == id), "")
            db.execute("UPDATE records SET owner = ? WHERE id = ?", (owner, id))
    db.execute("COMMIT")
