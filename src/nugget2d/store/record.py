"""`Record`: the metadata of a memory in a store, and its id."""

from collections.abc import Sequence
from datetime import datetime, timezone

from nugget2d.config import Frozen
from nugget2d.memory.memory import Fingerprint, Memory
from nugget2d.methods.options import CompressOptions, digest
from nugget2d.text.visible import escaped


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

    @staticmethod
    def of(
        memory: Memory, key: str, *, name: str, tags: Sequence[str], owner: str, settings: CompressOptions | None
    ) -> "Record":
        """A record of `memory`, created now; what UTF-8 cannot hold in its name and tags is escaped."""
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
        )


def record_id(key: str, owner: str) -> str:
    """The id of the memory at `key` for `owner`: 32 hexadecimal digits, like `key`."""
    return digest("record", key, owner)
