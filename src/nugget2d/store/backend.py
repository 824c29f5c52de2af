"""What a place must be able to do to be a store; folder.py and bucket.py do it."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

from nugget2d.memory import Memory
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
    """What is written for a record: the record itself and the vectors it is searched by, as bytes."""

    record: Record
    vectors: bytes

    def digest(self) -> bytes:
        """Checksum of both."""
        return blake2b(self.record.model_dump_json().encode() + b"\0" + self.vectors, digest_size=16).digest()


class Backend(Protocol):
    """Records and the memory files they lead to."""

    def keep(self, entry: Entry, data: bytes) -> Record:
        """Write the file, then the record: durable when it returns. A record that is there already is returned."""

    def record(self, record_id: str) -> Record | None:
        """The record of that very id."""

    def records(self) -> list[Record]:
        """All records, oldest first."""

    def entries(self) -> Iterator[Entry]:
        """All records with their vectors, oldest first."""

    def load(self, record: Record, *, verify: bool) -> Memory:
        """The memory of a record.

        Raises:
            StoreError: its file is missing.
            MemoryFileError: it is damaged.
        """

    def find(self, key: str) -> Memory | None:
        """An undamaged memory at a content address, whoever's it is."""

    def remove(self, record: Record) -> None:
        """Forget a record, and its file if no other record leads there."""

    def verify(self) -> list[Damage]:
        """Read everything and check it."""

    def sweep(self) -> Swept:
        """Remove files that no record leads to and that are too old to be somebody's who is still writing."""

    def close(self) -> None:
        """Let go of files and connections."""
