"""`FullText`: an index of words in SQLite (FTS5), which ranks segments of memories by BM25.

    words.db    beside the index of a store: made of its records, and made again if it is damaged or missing

It has no part in what a store keeps, and is brought up to date before a search (search.py). Where no file can be
written it lies in memory.
"""

import json
import math
import sqlite3
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from heapq import heapify, heappop
from pathlib import Path
from typing import NamedTuple, TypeVar

from nugget2d.errors import StoreError
from nugget2d.memory.fingerprint import Fingerprint
from nugget2d.store.folding import fold, phrases
from nugget2d.store.record import Record
from nugget2d.store.sqlite import address, transaction
from nugget2d.store.words import Words

APPLICATION_ID = 0x6E756777  # "nugw"
VERSION = 2  # of another one the file is made again, as of a damaged one
BUSY_SECONDS = 60  # another process adds a batch of records in well under a second

_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, version TEXT NOT NULL,
    owner TEXT, reader TEXT, state TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS tags (tag TEXT NOT NULL, record INTEGER NOT NULL, PRIMARY KEY (tag, record)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS segments (
    number INTEGER PRIMARY KEY, record INTEGER NOT NULL, start INTEGER NOT NULL, "end" INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS segments_by_record ON segments (record);
CREATE INDEX IF NOT EXISTS records_by_state ON records (state);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (text, tokenize = 'porter ascii');
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
COMMIT;
"""

T = TypeVar("T")


class Emptied(Exception):
    """The index has lost what it had: its file was damaged, or cannot be written and memory takes its place."""


class Found(NamedTuple):
    """The best segment of a record: characters `start` to `end`."""

    id: str
    score: float
    start: int
    end: int


class Indexed(NamedTuple):
    """A record, as far as it can be read, with its words or with the state that says why there are none.

    `version` is another one when it is written again.
    """

    id: str
    version: str
    record: Record | None
    words: Words | str


class Scope(NamedTuple):
    """Which records a search is about: those of an owner, with a tag, that a model can read; None takes all.

    `readers` are fingerprints as `reader_of` writes them.
    """

    owner: str | None = None
    tag: str | None = None
    readers: Collection[str] | None = None

    @property
    def condition(self) -> tuple[str, list[str]]:
        """SQL on the table records, and its values."""
        parts, values = ["1"], list[str]()
        if self.owner is not None:
            parts.append("records.owner = ?")
            values.append(self.owner)
        if self.tag is not None:
            parts.append("records.number IN (SELECT record FROM tags WHERE tag = ?)")
            values.append(self.tag)
        if self.readers is not None:
            parts.append(f"records.reader IN ({', '.join('?' * len(self.readers))})")
            values += self.readers
        return " AND ".join(parts), values


def reader_of(fingerprint: Fingerprint) -> str:
    """A fingerprint without its name, as JSON."""
    return json.dumps([fingerprint.model, fingerprint.tokenizer, fingerprint.scheme])


def fingerprint_of(reader: str) -> Fingerprint:
    """The inverse."""
    return Fingerprint("", *json.loads(reader))


class FullText:
    """Records and the words of their segments. A record without words has a `state` that says why.

    Safe to use from several threads and processes at once.
    """

    def __init__(self, path: Path | None) -> None:
        """Nothing is opened yet.

        Args:
            path: of the file; None keeps everything in memory.
        """
        self._path, self._in_file, self._removed = path, path is not None, False
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None

    def states(self) -> dict[str, tuple[str, str]]:
        """Version and state of each record, by id; the state is "" if its words are known."""
        query = "SELECT id, version, state FROM records"
        return self._run(lambda db: {id: (version, state) for id, version, state in db.execute(query)})

    def readers(self) -> list[str]:
        """Who can read them, each once."""
        query = "SELECT DISTINCT reader FROM records WHERE reader IS NOT NULL"
        return self._run(lambda db: [reader for (reader,) in db.execute(query)])

    def left_out(self, scope: Scope) -> list[tuple[str, str, str]]:
        """Records that have no words: id, version and state."""
        condition, values = scope.condition
        query = f"SELECT id, version, state FROM records WHERE state != '' AND {condition} ORDER BY number"
        return self._run(lambda db: db.execute(query, values).fetchall())

    def add(self, entries: Sequence[Indexed]) -> None:
        """Add records; one that is there already is replaced if it has no words yet."""

        def write(db: sqlite3.Connection) -> None:
            with transaction(db):
                _remove(db, [entry.id for entry in entries], "state != ''")
                for entry in entries:
                    _insert(db, entry)

        self._run(write)

    def remove(self, ids: Collection[str]) -> None:
        """Remove records."""

        def write(db: sqlite3.Connection) -> None:
            with transaction(db):
                _remove(db, ids)

        if ids:
            self._run(write)

    def search(self, query: str, scope: Scope) -> Iterator[Found]:
        """Records with any word of the query, best first.

        Scores are BM25 with the constants of FTS5 (k1 = 1.2, b = 0.75), summed over the words of the query. FTS5 takes
        a word of most segments for nothing, which in a store of few may be every word; here its weight is
        log(1 + (N - n + 0.5) / (n + 0.5)) for n of N segments that are wanted.
        """

        def rank(db: sqlite3.Connection) -> dict[int, float]:
            with transaction(db, "DEFERRED"):  # one state of the index for all counts
                return _scores(db, query, scope)

        heap = [(-score, segment) for segment, score in self._run(rank).items()]
        heapify(heap)
        told = set[str]()
        while heap:
            score, segment = heappop(heap)
            for id, start, end in self._run(partial(_places, segment=segment)):
                if id not in told:
                    told.add(id)
                    yield Found(id, -score, start, end)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _run(self, use: Callable[[sqlite3.Connection], T]) -> T:
        """What `use` returns of the connection, which is opened if it is not.

        Raises:
            Emptied: the file cannot be used; another takes its place, or memory.
            StoreError: SQLite lacks FTS5, or failed in memory, too.
        """
        with self._lock:
            try:
                if self._db is None:
                    self._db = self._open()
                return use(self._db)
            except sqlite3.Error as error:
                self.close()
                if "no such module" in str(error):
                    raise StoreError(f"search needs SQLite with FTS5: {error}; use a Python that has it") from error
                if not self._in_file:
                    raise StoreError(f"cannot index words: {error}") from error
                # its subclasses tell of files that are locked, cannot be written, or have no room
                self._in_file = type(error) is sqlite3.DatabaseError and self._forget_file()
                raise Emptied from error

    def _open(self) -> sqlite3.Connection:
        if self._path is None or not self._in_file:
            db = _connect(":memory:")
            if self._path is not None:
                with suppress(sqlite3.Error), closing(_connect(address(self._path, "immutable=1"))) as file:
                    if _is_current(file):
                        file.backup(db)
        else:
            db = _connect(address(self._path, "mode=rwc"))
            if not _is_current(db) and db.execute("SELECT 1 FROM sqlite_master").fetchone():
                db.close()
                raise sqlite3.DatabaseError("another file or version")
        if not _is_current(db):
            db.executescript(_SCHEMA)
        return db

    def _forget_file(self) -> bool:
        """Remove a file that cannot be read; False the second time, as if none could be written."""
        if self._path is None or self._removed:
            return False
        self._removed = True
        try:
            for path in (self._path, self._path.with_name(f"{self._path.name}-journal")):
                path.unlink(missing_ok=True)
        except OSError:
            return False
        return True


def _connect(uri: str) -> sqlite3.Connection:
    # transactions begin and end explicitly
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def _is_current(db: sqlite3.Connection) -> bool:
    found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    return found == [APPLICATION_ID, VERSION]


def _insert(db: sqlite3.Connection, entry: Indexed) -> None:
    """Add a record, if it is not there."""
    reader = None if entry.record is None else reader_of(entry.record.model)
    owner = None if entry.record is None else entry.record.owner
    state = "" if isinstance(entry.words, Words) else entry.words
    row = db.execute(
        "INSERT OR IGNORE INTO records (id, version, owner, reader, state) VALUES (?, ?, ?, ?, ?)",
        (entry.id, entry.version, owner, reader, state),
    )
    if not row.rowcount:  # another process was faster
        return
    number = row.lastrowid
    if entry.record is not None:
        tags = [(tag, number) for tag in entry.record.tags]
        db.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?)", tags)
    if isinstance(entry.words, Words):
        for text, span in zip(entry.words.texts, entry.words.spans, strict=True):
            row = db.execute('INSERT INTO segments (record, start, "end") VALUES (?, ?, ?)', (number, *span))
            db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (row.lastrowid, fold(text)))


def _remove(db: sqlite3.Connection, ids: Iterable[str], condition: str = "1") -> None:
    for id in ids:
        for (number,) in db.execute(f"SELECT number FROM records WHERE id = ? AND {condition}", (id,)).fetchall():
            db.execute("DELETE FROM words WHERE rowid IN (SELECT number FROM segments WHERE record = ?)", (number,))
            db.execute("DELETE FROM segments WHERE record = ?", (number,))
            db.execute("DELETE FROM tags WHERE record = ?", (number,))
            db.execute("DELETE FROM records WHERE number = ?", (number,))


def _scores(db: sqlite3.Connection, query: str, scope: Scope) -> dict[int, float]:
    """The score of each wanted segment that has a word of the query, by number."""
    (total,) = db.execute("SELECT count(*) FROM segments").fetchone()
    inside, values, asked = "", list[str](), total
    if scope != Scope():
        condition, values = scope.condition
        # the words first: for every segment that has one, a look whether its record is wanted
        inside = (
            "CROSS JOIN segments ON segments.number = words.rowid "
            f"CROSS JOIN records ON records.number = segments.record AND {condition}"
        )
        (asked,) = db.execute(
            f"SELECT count(*) FROM records JOIN segments ON segments.record = records.number WHERE {condition}", values
        ).fetchone()
    scores: defaultdict[int, float] = defaultdict(float)
    for phrase, times in Counter(phrases(query)).items():
        match = f'"{phrase}"'
        found = db.execute(
            f"SELECT words.rowid, -bm25(words) FROM words {inside} WHERE words MATCH ?", (*values, match)
        ).fetchall()
        often = len(found)
        if inside:
            (often,) = db.execute("SELECT count(*) FROM words WHERE words MATCH ?", (match,)).fetchone()
        weight = times * _rarity(asked, len(found)) / _rarity_of_fts5(total, often)
        for segment, score in found:
            scores[segment] += weight * score
    return scores


def _places(db: sqlite3.Connection, segment: int) -> list[tuple[str, int, int]]:
    """The record of a segment, if it is still there, and the characters that it stands for."""
    query = 'SELECT id, start, "end" FROM segments JOIN records ON records.number = record WHERE segments.number = ?'
    return db.execute(query, (segment,)).fetchall()


def _rarity(total: int, having: int) -> float:
    return math.log1p((total - having + 0.5) / (having + 0.5))


def _rarity_of_fts5(total: int, having: int) -> float:
    """The factor that bm25() multiplies with: for a single phrase it can be divided out again."""
    return max(math.log((total - having + 0.5) / (having + 0.5)), 1e-6)
