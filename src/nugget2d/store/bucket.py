"""A store in a bucket of S3 or a compatible service, through obstore.

    records/ID.json              a record, its words, a checksum of both, and the name of its file
    memories/KEY/NONCE.nugget    the file; each record has its own

There are no locks. A memory's file is written first, under a unique name, then its record, with the one conditional
write of such storage: create if absent. This write is the acknowledgement; of two writers of the same memory one
succeeds. Only a record that is damaged, or whose memory is, is overwritten. Unlike in a folder, records do not share
files: without transactions it cannot be decided that a removed record was the last one.
"""

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from nugget2d.errors import (
    DamageError,
    MemoryFileError,
    StoreError,
    UnknownMemoryError,
)
from nugget2d.store.backend import (
    Damage,
    Entry,
    Page,
    Swept,
    Wanted,
    checked_record,
    damaged,
    lost,
    read_entry,
    read_record,
    unknown,
)
from nugget2d.store.record import Record, record_id

if TYPE_CHECKING:
    from nugget2d.memory.memory import Memory

VERSION = 3
READABLE = (2, 3)  # records of version 2 hold no checksum of their memory
ORPHAN_SECONDS = 3600  # a writer that needs half as long between file and record starts over
REQUESTS = 16  # concurrent ones, for records


@dataclass(frozen=True)
class _Row:
    """The content of an object of records/."""

    text: bytes
    words: bytes
    file: str
    digest: bytes

    @staticmethod
    def of(entry: Entry, file: str) -> "_Row":
        return _Row(entry.text, entry.words, file, entry.digest)

    def checked(self, record_id: str) -> Record:
        """The record, if that and its words are what was written."""
        return checked_record(record_id, self.text, self.words, self.digest)

    def to_bytes(self) -> bytes:
        fields = {"words": b64encode(self.words).decode(), "digest": self.digest.hex(), "file": self.file}
        return json.dumps({"version": VERSION, "record": self.text.decode(), **fields}).encode()

    @staticmethod
    def from_bytes(data: bytes, record_id: str) -> "_Row":
        try:
            fields = json.loads(data)
            version = fields["version"]
            if version in READABLE:
                words = b64decode(fields["words"], validate=True)
                return _Row(fields["record"].encode(), words, fields["file"], bytes.fromhex(fields["digest"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(record_id, "it cannot be read") from error
        raise StoreError(f"record {record_id} has version {version}, this package reads {VERSION}; upgrade it")


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
            try:
                self._bucket = obstore.store.from_url(url, **options)
            except ValueError as error:
                raise StoreError(f"{url} is no address of a bucket: {str(error).splitlines()[0]}") from error
        # by name: version of the object, and what it holds if it is not damaged
        self._seen: dict[str, tuple[tuple[object, ...], _Row | None]] = {}

    def keep(self, entry: Entry, data: bytes) -> Record:
        """See `Backend`."""
        name = _row_name(entry.record.id)
        while True:
            start = time.monotonic()
            file = f"memories/{entry.record.key}/{uuid4().hex}.nugget"
            with self._errors():
                self._storage.put(self._bucket, file, data)
                if time.monotonic() - start > ORPHAN_SECONDS / 2:
                    continue  # `sweep` may be about to remove the file as an orphan
                try:
                    self._storage.put(self._bucket, name, _Row.of(entry, file).to_bytes(), mode="create")
                    return entry.record
                except self._exists:
                    pass
            known = None
            try:
                if (there := self._row(entry.record.id)) is None:  # removed just now
                    self._delete(file)
                    continue
                if there.file == file:  # ours: the answer to a first try was lost and the request repeated below
                    return entry.record
                known = there.checked(entry.record.id)
                self._load(known, there)
                self._delete(file)
                return known
            except (DamageError, MemoryFileError):
                if known is not None:
                    entry = Entry(entry.record.in_place_of(known), entry.words)
            with self._errors():
                self._storage.put(self._bucket, name, _Row.of(entry, file).to_bytes())
            if known is not None and there is not None:
                self._delete(there.file)
            return entry.record

    def record(self, record_id: str, owner: str | None = None) -> Record | None:
        """See `Backend`."""
        try:
            if (row := self._row(record_id)) is None:
                return None
            record = read_record(record_id, row.text)
        except DamageError:
            if owner is None or self._proves(record_id, owner):
                raise
            return None
        return record if owner in (None, record.owner) else None

    def whole(self, record_id: str, *, verify: bool) -> Record | None:
        """See `Backend`."""
        try:
            return self._whole(record_id, verify=verify)
        except (DamageError, MemoryFileError):
            return None

    def page(self, wanted: Wanted) -> Page:
        """See `Backend`; the bucket is listed whole, and damaged records are named with the first part."""
        entries, damages = self._listed()
        records = [entry.record for entry in entries if wanted.owner in (None, entry.record.owner)]
        if wanted.newest_first:
            records.reverse()
        if wanted.after is not None:
            places = [place for place, record in enumerate(records) if record.id == wanted.after]
            if not places:
                raise unknown(wanted.after)
            records, damages = records[places[0] + 1 :], []
        if wanted.tag is not None:
            records = [record for record in records if wanted.tag in record.tags]
        part = records[: wanted.limit]
        return Page(part, damages, len(part) < len(records))

    def nbytes(self, owner: str) -> int:
        """See `Backend`; without damaged records."""
        return sum(record.nbytes for record in self.page(Wanted(owner)).records)

    def matching(self, prefix: str) -> list[str]:
        """See `Backend`."""
        return sorted(id for id in map(_id, self._list("records/")) if id.startswith(prefix))

    def versions(self) -> dict[str, str]:
        """See `Backend`."""
        return {_id(name): str(_version(meta)) for name, meta in self._list("records/").items()}

    def entries(self, ids: Sequence[str]) -> list[Entry | Damage]:
        """See `Backend`."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = list(pool.map(self._entry, ids))
        return [entry for entry in found if entry is not None]

    def load(self, record: Record, *, verify: bool) -> "Memory":
        """See `Backend`; the whole file is read, and its checksum is always verified."""
        row = self._row(record.id)
        if row is None:
            raise UnknownMemoryError(f"memory {record.id} was removed just now")
        return self._load(record, row)

    def find(self, key: str) -> "Memory | None":
        """See `Backend`."""
        from nugget2d.memory.memory import Memory

        for name in self._list(f"memories/{key}/"):
            try:
                if (data := self._read(name)) is not None:
                    return Memory.from_bytes(data, name)
            except MemoryFileError:
                continue
        return None

    def remove(self, record_id: str, owner: str | None = None) -> bool:
        """See `Backend`."""
        try:
            if self.record(record_id, owner) is None:
                return False
        except DamageError:
            pass
        data = self._read(_row_name(record_id))
        self._delete(_row_name(record_id))
        with suppress(DamageError):  # of a record that cannot be read the file is left to `sweep`
            if data is not None:
                self._delete(_Row.from_bytes(data, record_id).file)
        return data is not None

    def verify(self) -> list[Damage]:
        """See `Backend`."""
        damages = []
        for name in sorted(self._list("records/")):
            try:
                self._whole(_id(name))
            except (DamageError, MemoryFileError) as error:
                damages.append(Damage(_id(name), f"{self._url}/{name}", str(error)))
        return damages

    def sweep(self) -> Swept:
        """See `Backend`; a file of a damaged record, which does not tell it any more, is one without a record."""
        # before the records: a file whose record is written in between is too new to be removed
        files = self._list("memories/")
        used = {row.file for row in self._rows().values() if row is not None}
        old = [
            (name, meta["size"])
            for name, meta in files.items()
            if name not in used and meta["last_modified"].timestamp() < time.time() - ORPHAN_SECONDS
        ]
        for name, _ in old:
            self._delete(name)
        return Swept(len(old), sum(size for _, size in old))

    def place(self, record: Record) -> str:
        """See `Backend`."""
        row = self._row(record.id)
        return f"{self._url}/{row.file if row is not None else ''}"

    def close(self) -> None:
        """See `Backend`; nothing has to be closed."""

    def _listed(self) -> tuple[list[Entry], list[Damage]]:
        """What can be read, oldest first, and what cannot."""
        entries, damages = [], []
        for name, row in self._rows().items():
            try:
                if row is None:
                    raise damaged(_id(name), "it cannot be read")
                entries.append(Entry(read_record(_id(name), row.text), row.words))
            except DamageError as error:
                damages.append(Damage(_id(name), f"{self._url}/{name}", str(error)))
        return sorted(entries, key=lambda entry: (entry.record.created, entry.record.id)), damages

    def _rows(self) -> dict[str, _Row | None]:
        """All of records/ by name, None for what is damaged. Each version of an object is fetched once."""
        listed = {name: _version(meta) for name, meta in self._list("records/").items()}
        new = [name for name, version in listed.items() if self._seen.get(name, (None,))[0] != version]
        seen = {name: self._seen[name] for name in listed.keys() - set(new)}
        with ThreadPoolExecutor(REQUESTS) as pool:
            for name, data in zip(new, pool.map(self._read, new), strict=True):
                if data is not None:
                    seen[name] = (listed[name], None)
                    with suppress(DamageError):
                        seen[name] = (listed[name], _Row.from_bytes(data, _id(name)))
        self._seen = seen
        return {name: row for name, (_, row) in seen.items()}

    def _entry(self, record_id: str) -> Entry | Damage | None:
        place = f"{self._url}/{_row_name(record_id)}"
        try:
            row = self._row(record_id)
        except DamageError as error:
            return Damage(record_id, place, str(error))
        return None if row is None else read_entry(record_id, place, row.text, row.words, row.digest)

    def _row(self, record_id: str) -> _Row | None:
        data = self._read(_row_name(record_id))
        return None if data is None else _Row.from_bytes(data, record_id)

    def _load(self, record: Record, row: _Row) -> "Memory":
        from nugget2d.memory.memory import Memory  # only here: lists do not wait for torch

        place = f"{self._url}/{row.file}"
        if (data := self._read(row.file)) is None:
            raise lost(record.id, place)
        return Memory.from_bytes(data, place, checksum=record.checksum or None)

    def _whole(self, record_id: str, *, verify: bool = True) -> Record | None:
        """The record of that id, if there is one; without `verify` its file is not read.

        Raises:
            DamageError, MemoryFileError: it, or its memory, is damaged or missing.
        """
        if (row := self._row(record_id)) is None:
            return None
        record = row.checked(record_id)
        if verify:
            self._load(record, row)
        elif self._size(row.file) <= record.nbytes:
            raise lost(record.id, f"{self._url}/{row.file}")
        return record

    def _proves(self, id: str, owner: str) -> bool:
        """Whether an id is this owner's: it is a digest of key and owner, and files lie under keys."""
        keys = {name.split("/")[1] for name in self._list("memories/")}
        return any(record_id(key, owner) == id for key in keys)

    def _delete(self, name: str) -> None:
        """A name that is not there is none to delete."""
        with self._errors(), suppress(FileNotFoundError):
            self._storage.delete(self._bucket, name)

    def _size(self, name: str) -> int:
        """Bytes of an object; 0 if there is none."""
        with self._errors():
            try:
                return int(self._storage.head(self._bucket, name)["size"])
            except FileNotFoundError:
                return 0

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


def _version(meta: Mapping[str, Any]) -> tuple[object, ...]:
    return meta["e_tag"], meta["last_modified"]


def _id(row_name: str) -> str:
    return row_name.removeprefix("records/").removesuffix(".json")
