"""`MemoryStore`: what users call."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from nugget2d.config import SelectionName
from nugget2d.errors import UnknownMemoryError
from nugget2d.memory import Memory
from nugget2d.model import Nugget2D
from nugget2d.states import StoreDtype
from nugget2d.store.backend import Backend, Damage, Entry, Swept
from nugget2d.store.embedding import Embedding
from nugget2d.store.folder import Folder
from nugget2d.store.record import Record, Settings, file_address, record_id


class Hit(NamedTuple):
    """A memory that a search found: `start` and `end` are the characters of the part that matched best."""

    record: Record
    score: float
    start: int
    end: int


class MemoryStore:
    """Memories by content address, with names, tags and owners.

    A record belongs to its `owner`, a namespace: whoever asks with another owner is told that it does not exist. Asking
    with None sees all. What two owners add alike is two records over one file.

    Safe to use from several threads and processes at once.
    """

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        """Open the store at `path`, a folder; with `create`, make it if there is none.

        Raises:
            StoreError: there is none, it is not a store, of a newer version, or cannot be opened.
        """
        self._backend: Backend = Folder(Path(path), create=create)

    def put(
        self,
        memory: Memory,
        *,
        key: str | None = None,
        name: str = "",
        tags: Sequence[str] = (),
        owner: str = "",
        settings: Settings | None = None,
    ) -> Record:
        """Keep a memory; when this returns, a power cut does not lose it.

        Args:
            memory: what to keep.
            key: its content address (`Settings.address`); None takes that of its own bytes.
            name: what a person calls it.
            tags: words to filter by.
            owner: whose it is.
            settings: how it was made, for the record.

        Returns:
            The record; the earlier one, unchanged, if this owner has this memory already.

        Raises:
            OutputError: the file cannot be written.
            StoreError: the index cannot be.
        """
        data = memory.to_bytes()
        record = Record.of(memory, key or file_address(data), name=name, tags=tags, owner=owner, settings=settings)
        return self._backend.keep(Entry(record, Embedding.of(memory).to_bytes()), data)

    def add(
        self,
        model: Nugget2D,
        text: str,
        *,
        ratio: float | None = None,
        quality: float | None = None,
        refine: int = 0,
        exact: bool = False,
        selection: SelectionName | None = None,
        dtype: StoreDtype | None = None,
        name: str = "",
        tags: Sequence[str] = (),
        owner: str = "",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Record:
        """Keep the memory of a text; it is compressed only if nobody added it before, by this model and so.

        The arguments are those of `Nugget2D.compress` and of `put`.

        Raises:
            InputError: see `Nugget2D.compress`.
            OutputError, StoreError: see `put`.
        """
        settings = Settings.of(
            model, ratio=ratio, quality=quality, refine=refine, exact=exact, selection=selection, dtype=dtype
        )
        key = settings.address(text, model.fingerprint)
        if (known := self._backend.record(record_id(key, owner))) is not None:
            return known
        memory = self._backend.find(key) or settings.compress(model, text, on_progress)
        return self.put(memory, key=key, name=name, tags=tags, owner=owner, settings=settings)

    def get(self, id: str, *, owner: str | None = None, verify: bool = True) -> Memory:
        """The memory of a record.

        In a folder its file is mapped into memory: layers are paged in as they are touched, and processes that
        read the same memory share its pages.

        Args:
            id: of the record, whole.
            owner: who asks.
            verify: False leaves out the checksum, for which every page is touched once.

        Raises:
            UnknownMemoryError: there is no such record, or it is another owner's.
            StoreError: its file is missing.
            MemoryFileError: its file is damaged.
        """
        return self._backend.load(self.record(id, owner=owner), verify=verify)

    def record(self, id: str, *, owner: str | None = None) -> Record:
        """The record of that id.

        Raises:
            UnknownMemoryError: there is no such record, or it is another owner's.
        """
        record = self._backend.record(id)
        if record is None or owner not in (None, record.owner):
            raise UnknownMemoryError(f"there is no memory {id!r} in this store")
        return record

    def records(self, *, owner: str | None = None, tag: str | None = None) -> list[Record]:
        """All records of an owner, with a tag, oldest first."""
        return [record for record in self._backend.records() if _wanted(record, owner, tag)]

    def remove(self, id: str, *, owner: str | None = None) -> None:
        """Forget a record; its file goes with the last record that leads there.

        Raises:
            UnknownMemoryError: there is no such record, or it is another owner's.
        """
        self._backend.remove(self.record(id, owner=owner))

    def search(
        self, model: Nugget2D, query: str, *, top: int = 10, owner: str | None = None, tag: str | None = None
    ) -> list[Hit]:
        """The memories whose meaning is nearest to `query`, best first, each with its best segment.

        Only memories of `model` are compared. The search is exact: one matrix product over the vectors of all segments
        (see embedding.py).

        Raises:
            InputError: an empty query.
        """
        wanted = Embedding.of(model.compress(query, ratio=1)).vectors.astype(np.float32).mean(0)
        hits = []
        for entry in self._backend.entries():
            if entry.record.model != model.fingerprint or not _wanted(entry.record, owner, tag):
                continue
            embedding = Embedding.from_bytes(entry.vectors)
            vectors = embedding.vectors.astype(np.float32)
            scores = vectors @ wanted / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted))
            best = int(scores.argmax())
            hits.append(Hit(entry.record, float(scores[best]), *embedding.spans[best].tolist()))
        return sorted(hits, key=lambda hit: hit.score, reverse=True)[:top]

    def verify(self) -> list[Damage]:
        """Read and check everything: what is damaged, by name; an empty list if nothing is."""
        return self._backend.verify()

    def gc(self) -> Swept:
        """Remove what interrupted writers left behind, if it is an hour old."""
        return self._backend.sweep()

    def close(self) -> None:
        """Let go of files and connections."""
        self._backend.close()

    def __enter__(self) -> "MemoryStore":
        """Nothing is done; leaving closes."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()


def _wanted(record: Record, owner: str | None, tag: str | None) -> bool:
    return owner in (None, record.owner) and (tag is None or tag in record.tags)
