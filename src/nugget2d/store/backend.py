"""The interface of store backends, which folder.py and bucket.py implement."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pydantic import ValidationError

from nugget2d.errors import DamageError, UnknownMemoryError
from nugget2d.store.record import Record

if TYPE_CHECKING:  # lists do not wait for torch
    from nugget2d.memory.memory import Memory


class Damage(NamedTuple):
    """Something that is damaged: where, and what is wrong with it. `id` is empty if it is no single memory."""

    id: str
    place: str
    reason: str


class Swept(NamedTuple):
    """What `gc` removed."""

    files: int
    nbytes: int


class Page(NamedTuple):
    """A part of a list: its records, those among them that cannot be read, and whether there are more after them."""

    records: list[Record]
    damages: list[Damage]
    more: bool


@dataclass(frozen=True)
class Wanted:
    """What is listed, by age.

    Attributes:
        owner: whose records; None takes those of all.
        tag: that they have.
        after: the id of the record before the first one.
        limit: how many at most.
        newest_first: the order.
    """

    owner: str | None = None
    tag: str | None = None
    after: str | None = None
    limit: int | None = None
    newest_first: bool = False


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
        DamageError: it is damaged.
    """
    try:
        record = Record.model_validate_json(text)
    except ValidationError as error:
        raise damaged(record_id, "it cannot be read") from error
    if record.id != record_id:
        raise damaged(record_id, "it is another one")
    return record


def checked_record(record_id: str, text: bytes, words: bytes, digest: bytes) -> Record:
    """A record from its JSON, if that and its words are what was written.

    Raises:
        DamageError: they are not.
    """
    if entry_digest(text, words) != digest:
        raise damaged(record_id, "it does not match its checksum")
    return read_record(record_id, text)


def damaged(record_id: str, how: str) -> DamageError:
    """The error of a record that is not what was written."""
    return DamageError(f"record {record_id} is damaged ({how}); add its text again, or remove it")


def lost(record_id: str, place: str) -> DamageError:
    """The error of a record whose file is not at its place."""
    return DamageError(f"memory {record_id} has lost its file {place}; add its text again, or remove it")


def unknown(record_id: str) -> UnknownMemoryError:
    """The error of an id that is no record's, or another owner's."""
    return UnknownMemoryError(f"there is no memory {record_id!r} in this store")


def read_entry(record_id: str, place: str, text: bytes, words: bytes, digest: bytes) -> Entry | Damage:
    """A record and its words, or what is wrong with them."""
    try:
        return Entry(checked_record(record_id, text, words, digest), words)
    except DamageError as error:
        return Damage(record_id, place, str(error))


class Backend(Protocol):
    """Records, and the memory files that they point to."""

    def keep(self, entry: Entry, data: bytes) -> Record:
        """Write the file, then the record: durable when it returns.

        An existing record of this id is returned as it is if it is whole; else it is replaced.
        """

    def record(self, record_id: str, owner: str | None = None) -> Record | None:
        """The record of that id, if there is one of this owner (None: of anybody).

        Raises:
            DamageError: it is damaged.
        """

    def whole(self, record_id: str, *, verify: bool) -> Record | None:
        """The record of that id, if there is one and neither it nor its memory is damaged or missing.

        Without `verify` the file is not read: it is only there, and not cut off before its states end.
        """

    def page(self, wanted: Wanted) -> Page:
        """A part of the list.

        Raises:
            UnknownMemoryError: there is no record to begin after.
        """

    def nbytes(self, owner: str) -> int:
        """Bytes of an owner's memories, together."""

    def matching(self, prefix: str) -> list[str]:
        """The ids that begin so, of damaged records too."""

    words_file: Path | None
    """Where the index of a search may lie (fulltext.py); None keeps it in memory."""

    def versions(self) -> dict[str, str]:
        """By id, of all records, damaged ones too, what changes when one is written again; in a folder oldest first."""

    def entries(self, ids: Sequence[str]) -> list[Entry | Damage]:
        """Those of these records, some hundreds at most, that there are, with their words; in the order of `ids`."""

    def load(self, record: Record, *, verify: bool) -> "Memory":
        """The memory of a record.

        Raises:
            UnknownMemoryError: it was removed meanwhile.
            DamageError: its file is missing.
            MemoryFileError: its file is damaged, or another memory's.
        """

    def find(self, key: str) -> "Memory | None":
        """An undamaged memory at a content address, of any owner."""

    def remove(self, record_id: str, owner: str | None = None) -> bool:
        """Remove a record of this owner (None: of anybody), and its file if no other record points to it.

        It may be damaged. Returns whether there was one.
        """

    def verify(self) -> list[Damage]:
        """Read everything and check it."""

    def sweep(self) -> Swept:
        """Remove files without a record that are too old to belong to a write in progress."""

    def place(self, record: Record) -> str:
        """Where the file of a record is, for display."""

    def close(self) -> None:
        """Close files and connections."""
