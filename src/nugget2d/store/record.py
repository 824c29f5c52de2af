"""`Record`: the metadata of a memory in a store, and its id."""

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from nugget2d.config import Frozen
from nugget2d.memory.fingerprint import Fingerprint
from nugget2d.methods.options import CompressOptions, digest
from nugget2d.text.visible import escaped

if TYPE_CHECKING:
    from nugget2d.memory.memory import Memory


class Record(Frozen):
    """One memory in a store, as one owner sees it.

    Attributes:
        id: in hexadecimal digits, made of `key` and `owner`.
        key: content address of the memory: that of text, model and settings, or the memory's own checksum.
        name: for display, such as a file name.
        tags: any words, to filter by.
        owner: namespace; other owners do not see the record.
        created: UTC, ISO 8601.
        num_tokens: tokens of the text (n).
        num_nuggets: tokens kept (k).
        num_chars: characters of the text.
        ratio: n / k.
        nbytes: bytes of keys, values and scales (`Memory.nbytes`).
        model: who can read it.
        settings: how it was made, if that was given.
        checksum: of the memory (`Memory.checksum`); empty in records of earlier stores.
    """

    id: str
    key: str
    name: str
    tags: tuple[str, ...]
    owner: str
    created: str
    num_tokens: int
    num_nuggets: int
    num_chars: int
    ratio: float
    nbytes: int
    model: Fingerprint
    settings: CompressOptions | None
    checksum: str = ""

    @staticmethod
    def of(
        memory: "Memory",
        key: str | None,
        *,
        name: str,
        tags: Sequence[str],
        owner: str,
        settings: CompressOptions | None,
    ) -> "Record":
        """A record of `memory`, created now; without a key its checksum is the key.

        What UTF-8 cannot hold in its name and tags is escaped.
        """
        checksum = memory.checksum
        key = key or checksum
        return Record(
            id=record_id(key, owner),
            key=key,
            name=escaped(name),
            tags=tuple(map(escaped, tags)),
            owner=owner,
            created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            num_tokens=memory.num_tokens,
            num_nuggets=memory.num_nuggets,
            num_chars=memory.num_chars,
            ratio=memory.ratio,
            nbytes=memory.nbytes,
            model=memory.fingerprint,
            settings=settings,
            checksum=checksum,
        )

    @property
    def file(self) -> str:
        """The name of the memory's file, where records share files: equal memories have one."""
        return self.checksum or self.key

    def in_place_of(self, lost: "Record") -> "Record":
        """This record for a memory that was lost: what people gave that one stays."""
        return self.model_copy(update={"name": lost.name, "tags": lost.tags})


def record_id(key: str, owner: str) -> str:
    """The id of the memory at `key` for `owner`: 32 hexadecimal digits, like `key`."""
    return digest("record", key, owner)
