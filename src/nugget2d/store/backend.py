"""The interface of store backends, which folder.py and bucket.py implement."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import ValidationError

from nugget2d.errors import StoreError
from nugget2d.memory.memory import Memory
from nugget2d.store.record import Record


class Damage(NamedTuple):
    """Something that `verify` found: where, and what is wrong with it. `id` is empty if it is no single memory."""

    id: str
    place: str
    reason: str


class Swept(NamedTuple):
    """What `gc` removed."""

    files: int
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """A record and, as bytes, the words that it is searched by."""

    record: Record
    words: bytes

    @property
    def text(self) -> bytes:
        """The record as JSON."""
        return self.record.model_dump_json().encode()

    @property
    def digest(self) -> bytes:
        """Checksum of both."""
        return entry_digest(self.text, self.words)


def entry_digest(text: bytes, words: bytes) -> bytes:
    """Checksum of a record, as JSON, and its words."""
    return blake2b(text + b"\0" + words, digest_size=16).digest()


def read_record(record_id: str, text: bytes) -> Record:
    """A record from its JSON.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise StoreError(f"record {record_id} is damaged; remove it and add its text again") from error


def read_entry(record_id: str, place: str, text: bytes, words: bytes, digest: bytes) -> Entry | Damage:
    """A record and its words, or what is wrong with them."""
    if entry_digest(text, words) != digest:
        return Damage(record_id, place, "its record does not match its checksum")
    try:
        return Entry(read_record(record_id, text), words)
    except StoreError as error:
        return Damage(record_id, place, str(error))


class Backend(Protocol):
    """Records, and the memory files that they point to."""

    def keep(self, entry: Entry, data: bytes) -> Record:
        """Write the file, then the record: durable when it returns. An existing record of this id is returned as is."""

    def record(self, record_id: str) -> Record | None:
        """The record of that id, if there is one."""

    def records(self) -> list[Record]:
        """All records, oldest first."""

    words_file: Path | None
    """Where the index of a search may lie (fulltext.py); None keeps it in memory."""

    def ids(self) -> list[str]:
        """Of all records, damaged ones too; in a folder oldest first."""

    def entries(self, ids: Sequence[str]) -> list[Entry | Damage]:
        """Those of these records, some hundreds at most, that there are, with their words; in the order of `ids`."""

    def load(self, record: Record, *, verify: bool) -> Memory:
        """The memory of a record.

        Raises:
            UnknownMemoryError: it was removed meanwhile.
            StoreError: its file is missing.
            MemoryFileError: its file is damaged.
        """

    def find(self, key: str) -> Memory | None:
        """An undamaged memory at a content address, of any owner."""

    def remove(self, record_id: str) -> bool:
        """Remove a record, and its file if no other record points to it; returns whether there was one."""

    def verify(self) -> list[Damage]:
        """Read everything and check it."""

    def sweep(self) -> Swept:
        """Remove files without a record that are too old to belong to a write in progress."""

    def place(self, record: Record) -> str:
        """Where the file of a record is, for display."""

    def close(self) -> None:
        """Close files and connections."""
