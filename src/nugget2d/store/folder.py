"""A store in a folder: `index.db` (index.py) and one safetensors file a memory.

    index.db              records, words, checksums of both
    words.db              an index of the words, made again where it is missing (fulltext.py)
    memories/ab/abcd...   files named by the memory's checksum (in earlier stores by its content address); records of
                          several owners may point to one

A memory is written in this order: its file (flushed, renamed into place, folder flushed), then its row, in a
transaction that is flushed when it ends (synchronous=FULL). The row is the acknowledgement: a crash before it leaves a
file without a record, for `sweep`. Files are removed only under SQLite's write lock, and a row is inserted under the
same lock, after a check that its file (still) exists: no order of events leaves a record without its file. A file is
only ever replaced by one of the same content.

Links are not followed: what is written and removed lies in the store's own folders.
"""

import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nugget2d.errors import (
    DamageError,
    MemoryFileError,
    OutputError,
    StoreError,
    UnknownMemoryError,
)
from nugget2d.files import atomic_write, sync_folder
from nugget2d.store.backend import Damage, Entry, Page, Swept, Wanted, lost, read_entry, read_record
from nugget2d.store.index import Index, Row, insert
from nugget2d.store.record import Record

if TYPE_CHECKING:
    from nugget2d.memory.memory import Memory

ORPHAN_SECONDS = 3600  # between a file and its row there are milliseconds
BATCH = 256  # rows that are checked at a time

_FOLDER = re.compile("[0-9a-f]{2}")
# memories, and what an interrupted `atomic_write` leaves
_FILE = re.compile(r"[0-9a-f]{32}\.nugget|\.(nugget2d-|[0-9a-f]{32}\.nugget\.).+\.tmp")


class Folder:
    """See `Backend`."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Open the store at `path`; with `create`, make it if there is none.

        Raises:
            StoreError: there is none, it is not a store, of a newer version, or cannot be opened.
        """
        self._index, self._memories = Index(path / "index.db", create=create), path / "memories"
        self.words_file: Path | None = path / "words.db"

    def keep(self, entry: Entry, data: bytes) -> Record:
        """See `Backend`."""
        path = self._path(entry.record.file)
        while True:
            self._write(path, data)
            with self._index.transaction() as db:
                if not path.is_file():
                    continue  # removed by a sweep before its row was inserted
                there = self._index.row(entry.record.id)
                if (kept := self._whole(there)) is None:
                    if there is not None:
                        entry = self._in_place_of(there, entry)
                    kept = entry.record
                    insert(db, Row.of(entry))
            break
        for unused in {entry.record.file, there.file if there else kept.file} - {kept.file}:
            self._remove_orphan(self._path(unused), 0)
        return kept

    def record(self, record_id: str, owner: str | None = None) -> Record | None:
        """See `Backend`."""
        rows = self._index.rows("SELECT record, owner FROM records WHERE id = ?", record_id)
        if not rows or owner not in (None, rows[0][1]):
            return None
        return read_record(record_id, rows[0][0])

    def whole(self, record_id: str, *, verify: bool) -> Record | None:
        """See `Backend`."""
        return self._whole(self._index.row(record_id), verify=verify)

    def page(self, wanted: Wanted) -> Page:
        """See `Backend`."""
        most = None if wanted.limit is None else wanted.limit + 1  # one more tells whether there are more
        records: list[Record] = []
        damages: list[Damage] = []
        while True:  # usually once: in place of a damaged record comes the next one
            left = None if most is None else most - len(records)
            rows = self._index.listed(replace(wanted, limit=left))
            for record_id, text in rows:
                try:
                    records.append(read_record(record_id, text))
                except DamageError as error:
                    damages.append(Damage(record_id, str(self._index.path), str(error)))
            if left is None or len(rows) < left or len(records) == most:
                return Page(records[: wanted.limit], damages, len(records) == most)
            wanted = replace(wanted, after=rows[-1][0])

    def nbytes(self, owner: str) -> int:
        """See `Backend`."""
        ((total,),) = self._index.rows("SELECT ifnull(sum(nbytes), 0) FROM records WHERE owner = ?", owner)
        return int(total)

    def matching(self, prefix: str) -> list[str]:
        """See `Backend`."""
        rows = self._index.rows("SELECT id FROM records WHERE substr(id, 1, ?) = ?", len(prefix), prefix)
        return [record_id for (record_id,) in rows]

    def versions(self) -> dict[str, str]:
        """See `Backend`."""
        return dict(self._index.rows("SELECT id, CAST(created AS TEXT) FROM records ORDER BY created, id"))

    def entries(self, ids: Sequence[str]) -> list[Entry | Damage]:
        """See `Backend`."""
        places = ", ".join("?" * len(ids))
        columns = ", ".join(f"CAST({name} AS BLOB)" for name in ("record", "words", "digest"))  # whatever lies there
        rows = self._index.rows(f"SELECT id, {columns} FROM records WHERE id IN ({places}) ORDER BY created, id", *ids)
        return [read_entry(row[0], str(self._index.path), *row[1:]) for row in rows]

    def load(self, record: Record, *, verify: bool) -> "Memory":
        """See `Backend`; the file is mapped into memory, not read."""
        path = self._path(record.file)
        if not path.is_file():
            if self.record(record.id) is None:
                raise UnknownMemoryError(f"memory {record.id} was removed just now")
            raise lost(record.id, str(path))
        from nugget2d.memory.memory import Memory  # only here: lists do not wait for torch

        return Memory.map(path, verify=verify, checksum=record.checksum or None)

    def find(self, key: str) -> "Memory | None":
        """See `Backend`."""
        for record_id, text in self._index.rows("SELECT id, record FROM records WHERE key = ?", key):
            with suppress(DamageError, UnknownMemoryError, MemoryFileError):
                return self.load(read_record(record_id, text), verify=True)
        return None

    def remove(self, record_id: str, owner: str | None = None) -> bool:
        """See `Backend`."""
        with self._index.transaction() as db:
            rows = db.execute(
                "DELETE FROM records WHERE id = ? AND ifnull(?, owner) = owner RETURNING CAST(file AS TEXT)",
                (record_id, owner),
            ).fetchall()
            if rows:
                db.execute("DELETE FROM tags WHERE id = ?", (record_id,))
        if not rows:
            return False
        # in a separate transaction: a crash in between may leave an orphaned file, but no row without a file
        self._remove_orphan(self._path(rows[0][0]), 0)
        return True

    def verify(self) -> list[Damage]:
        """See `Backend`."""
        problems = [problem for (problem,) in self._index.rows("PRAGMA integrity_check")]
        damages = [Damage("", str(self._index.path), problem) for problem in problems if problem != "ok"]
        reasons: dict[str, str | None] = {}  # of each file, read once for all records that point to it
        for number, row in self._all_rows():
            try:
                record, place = self._index.checked(row), self._path(row.file)
                if row.file not in reasons:
                    reasons[row.file] = self._problem(record)
                reason = reasons[row.file]
            except DamageError as error:
                place, reason = self._index.path, str(error)
            # else it was removed or mended just now
            if reason is not None and self._index.some_rows(number - 1, 1) == [(number, row)]:
                damages.append(Damage(row.id, str(place), reason))
        return damages

    def sweep(self) -> Swept:
        """See `Backend`; partly written files are removed too."""
        self._index.require_here()
        sizes = [self._remove_orphan(path, ORPHAN_SECONDS) for path in self._files()]
        removed = [size for size in sizes if size is not None]
        return Swept(len(removed), sum(removed))

    def place(self, record: Record) -> str:
        """See `Backend`."""
        return str(self._path(record.file))

    def close(self) -> None:
        """See `Backend`."""
        self._index.close()

    def _path(self, name: str) -> Path:
        return self._memories / name[:2] / f"{name}.nugget"

    def _whole(self, row: Row | None, *, verify: bool = True) -> Record | None:
        """The record of a row, if that and the memory are whole."""
        if row is None:
            return None
        try:
            record = self._index.checked(row)
            if verify:
                self.load(record, verify=True)
        except (DamageError, UnknownMemoryError, MemoryFileError):
            return None
        return record if verify or self._is_there(record) else None

    def _is_there(self, record: Record) -> bool:
        """Whether there is a file of at least the size that the states have."""
        try:
            status = self._path(record.file).stat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size > record.nbytes

    def _in_place_of(self, there: Row, entry: Entry) -> Entry:
        """An entry for a memory that was lost; if its record can be trusted, what people gave it stays."""
        try:
            return replace(entry, record=entry.record.in_place_of(self._index.checked(there)))
        except DamageError:
            return entry

    def _problem(self, record: Record) -> str | None:
        try:
            self.load(record, verify=True)
        except UnknownMemoryError:
            return None
        except (DamageError, MemoryFileError) as error:
            return str(error)
        return None

    def _all_rows(self) -> Iterator[tuple[int, Row]]:
        after = 0
        while rows := self._index.some_rows(after, BATCH):
            yield from rows
            after = rows[-1][0]

    def _files(self) -> Iterator[Path]:
        """Everything below memories/ that a store writes."""
        for folder in self._memories.iterdir() if self._is_own(self._memories) else ():
            if _FOLDER.fullmatch(folder.name) and self._is_own(folder):
                yield from (path for path in folder.iterdir() if _FILE.fullmatch(path.name))

    @staticmethod
    def _is_own(folder: Path) -> bool:
        return folder.is_dir() and not folder.is_symlink()

    def _write(self, path: Path, data: bytes) -> None:
        try:
            self._index.require_here()  # else folders would be made where there is no store
            for folder in (self._memories, path.parent):
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    sync_folder(folder.parent)
                if not self._is_own(folder):
                    raise StoreError(
                        f"{folder} is a link or a file, which a store does not write to; put a folder there"
                    )
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        with atomic_write(path) as file:
            file.write(data)

    def _remove_orphan(self, path: Path, age: float) -> int | None:
        """Remove a file without a record, if it was not written in the last `age` seconds; its size if removed."""
        with self._index.transaction() as db:
            if db.execute("SELECT 1 FROM records WHERE file = ?", (path.stem,)).fetchone():
                return None
            if not _FOLDER.fullmatch(path.parent.name) or not _FILE.fullmatch(path.name):  # as of a damaged record
                return None
            try:
                status = path.lstat()
                own = self._is_own(self._memories) and self._is_own(path.parent)
                if not own or not stat.S_ISREG(status.st_mode) or status.st_mtime > time.time() - age:
                    return None
                path.unlink()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise OutputError(f"cannot remove {path}: {error.strerror or error}") from error
            return status.st_size
