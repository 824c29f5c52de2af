"""A store in a bucket of S3 or a compatible service, through obstore.

    records/ID.json              a record, its words, a checksum of both, and the name of its file
    memories/KEY/NONCE.nugget    the file; each record has its own

There are no locks. A memory's file is written first, under a unique name, then its record, with the one conditional
write of such storage: create if absent. This write is the acknowledgement; of two writers of the same memory one
succeeds. Unlike in a folder, records do not share files: without transactions it cannot be decided that a removed
record was the last one.
"""

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from nugget2d.errors import MemoryFileError, NuggetError, StoreError, UnknownMemoryError
from nugget2d.memory.memory import Memory
from nugget2d.store.backend import Damage, Entry, Swept, entry_digest, read_entry, read_record
from nugget2d.store.record import Record

VERSION = 2
ORPHAN_SECONDS = 3600  # a writer that needs half as long between file and record starts over
REQUESTS = 16  # concurrent ones, for records


@dataclass(frozen=True)
class _Row:
    """The content of an object of records/."""

    text: bytes
    words: bytes
    file: str
    digest: bytes

    def to_bytes(self) -> bytes:
        fields = {"words": b64encode(self.words).decode(), "digest": self.digest.hex(), "file": self.file}
        return json.dumps({"version": VERSION, "record": self.text.decode(), **fields}).encode()

    @staticmethod
    def from_bytes(data: bytes, source: str) -> "_Row":
        try:
            fields = json.loads(data)
            version = fields["version"]
            if version == VERSION:
                words = b64decode(fields["words"], validate=True)
                return _Row(fields["record"].encode(), words, fields["file"], bytes.fromhex(fields["digest"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{source} is damaged; remove it and add its text again") from error
        raise StoreError(f"{source} has version {version}, this package reads {VERSION}; upgrade it")


class Bucket:
    """See `Backend`."""

    words_file: Path | None = None  # in memory

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """Open the bucket at `url`; `options` are those of obstore's `from_url`.

        Raises:
            StoreError: obstore is not installed, or rejects the address or an option.
        """
        try:
            import obstore
            from obstore.exceptions import AlreadyExistsError, BaseError
        except ImportError as error:
            raise StoreError("stores in a bucket need obstore: pip install 'nugget2d[s3]'") from error
        self._url, self._storage = url.rstrip("/"), obstore
        self._failures, self._exists = (BaseError, OSError), AlreadyExistsError
        with self._errors():
            self._bucket = obstore.store.from_url(url, **options)
        self._seen: dict[str, tuple[tuple[object, ...], _Row]] = {}  # by name: version of the object, what it holds

    def keep(self, entry: Entry, data: bytes) -> Record:
        """See `Backend`."""
        record, name = entry.record, _row_name(entry.record.id)
        while True:
            start = time.monotonic()
            file = f"memories/{record.key}/{uuid4().hex}.nugget"
            row = _Row(entry.text, entry.words, file, entry.digest)
            with self._errors():
                self._storage.put(self._bucket, file, data)
                if time.monotonic() - start > ORPHAN_SECONDS / 2:
                    continue  # `sweep` may be about to remove the file as an orphan
                try:
                    self._storage.put(self._bucket, name, row.to_bytes(), mode="create")
                    return record
                except self._exists:
                    there = self._row(name)
                    # ours, if the answer to a first try was lost and the request repeated below
                    if there is not None and there.file == file:
                        return record
                    self._storage.delete(self._bucket, file)
            if there is not None:  # else removed just now
                return read_record(record.id, there.text)

    def record(self, record_id: str) -> Record | None:
        """See `Backend`."""
        row = self._row(_row_name(record_id))
        return None if row is None else read_record(record_id, row.text)

    def records(self) -> list[Record]:
        """See `Backend`."""
        records = [read_record(_id(name), row.text) for name, row in self._rows().items()]
        return sorted(records, key=lambda record: (record.created, record.id))

    def ids(self) -> list[str]:
        """See `Backend`."""
        return [_id(name) for name in self._list("records/")]

    def entries(self, ids: Sequence[str]) -> list[Entry | Damage]:
        """See `Backend`."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = list(pool.map(self._entry, ids))
        return [entry for entry in found if entry is not None]

    def load(self, record: Record, *, verify: bool) -> Memory:
        """See `Backend`; the whole file is read, and its checksum is always verified."""
        row = self._row(_row_name(record.id))
        if row is None:
            raise UnknownMemoryError(f"memory {record.id} was removed just now")
        data = self._read(row.file)
        if data is None:
            raise StoreError(
                f"memory {record.id} has lost its file {self._url}/{row.file}; remove it and add its text again"
            )
        return Memory.from_bytes(data, f"{self._url}/{row.file}")

    def find(self, key: str) -> Memory | None:
        """See `Backend`."""
        for name in self._list(f"memories/{key}/"):
            try:
                if (data := self._read(name)) is not None:
                    return Memory.from_bytes(data, name)
            except MemoryFileError:
                continue
        return None

    def remove(self, record_id: str) -> bool:
        """See `Backend`."""
        name = _row_name(record_id)
        data = self._read(name)
        if data is None:
            return False
        with self._errors():
            self._storage.delete(self._bucket, name)
            with suppress(StoreError):  # of a record that cannot be read the file is left to `sweep`
                self._storage.delete(self._bucket, _Row.from_bytes(data, name).file)
        return True

    def verify(self) -> list[Damage]:
        """See `Backend`."""
        damages = []
        for name in sorted(self._list("records/")):
            try:
                if (row := self._row(name)) is None:
                    continue  # removed meanwhile
                if entry_digest(row.text, row.words) != row.digest:
                    raise StoreError("its record does not match its checksum")
                self.load(read_record(_id(name), row.text), verify=True)
            except UnknownMemoryError:
                continue
            except NuggetError as error:
                damages.append(Damage(_id(name), f"{self._url}/{name}", str(error)))
        return damages

    def sweep(self) -> Swept:
        """See `Backend`."""
        files = self._list(
            "memories/"
        )  # before the records: a file whose record is written in between is too new to be removed
        used = {row.file for row in self._rows().values()}
        old = [
            (name, meta["size"])
            for name, meta in files.items()
            if name not in used and meta["last_modified"].timestamp() < time.time() - ORPHAN_SECONDS
        ]
        with self._errors():
            for name, _ in old:
                self._storage.delete(self._bucket, name)
        return Swept(len(old), sum(size for _, size in old))

    def place(self, record: Record) -> str:
        """See `Backend`."""
        row = self._row(_row_name(record.id))
        return f"{self._url}/{row.file if row is not None else ''}"

    def close(self) -> None:
        """See `Backend`; nothing has to be closed."""

    def _rows(self) -> dict[str, _Row]:
        """All of records/ by name. Objects never change, so each version is fetched once."""
        listed = {name: (meta["e_tag"], meta["last_modified"]) for name, meta in self._list("records/").items()}
        new = [name for name, version in listed.items() if self._seen.get(name, (None,))[0] != version]
        with ThreadPoolExecutor(REQUESTS) as pool:
            fetched = dict(zip(new, pool.map(self._row, new), strict=True))
        seen = {name: self._seen[name] for name in listed.keys() - set(new)}
        seen |= {name: (listed[name], row) for name, row in fetched.items() if row is not None}
        self._seen = seen
        return {name: row for name, (_, row) in seen.items()}

    def _entry(self, record_id: str) -> Entry | Damage | None:
        name = _row_name(record_id)
        place = f"{self._url}/{name}"
        if (data := self._read(name)) is None:
            return None
        try:
            row = _Row.from_bytes(data, place)
        except StoreError as error:
            return Damage(record_id, place, str(error))
        return read_entry(record_id, place, row.text, row.words, row.digest)

    def _row(self, name: str) -> _Row | None:
        data = self._read(name)
        return None if data is None else _Row.from_bytes(data, f"{self._url}/{name}")

    def _read(self, name: str) -> bytes | None:
        with self._errors():
            try:
                return bytes(self._storage.get(self._bucket, name).bytes())
            except FileNotFoundError:
                return None

    def _list(self, prefix: str) -> dict[str, Any]:
        """The metadata of each object below `prefix`, by name."""
        with self._errors():
            return {meta["path"]: meta for page in self._storage.list(self._bucket, prefix) for meta in page}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            reason = " ".join(str(error).split("Debug source")[0].split())
            raise StoreError(f"{self._url}: {reason}") from error


def _row_name(record_id: str) -> str:
    return f"records/{record_id}.json"


def _id(row_name: str) -> str:
    return row_name.removeprefix("records/").removesuffix(".json")
