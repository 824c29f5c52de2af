"""`MemoryStore`: the public interface of a store."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nugget2d.deprecation import moved_argument
from nugget2d.errors import DamageWarning, InputError, StoreError, warn
from nugget2d.files import expand_home
from nugget2d.methods.options import CompressOptions
from nugget2d.store.backend import Backend, Damage, Entry, Page, Swept, Wanted, unknown
from nugget2d.store.bucket import Bucket
from nugget2d.store.folder import Folder
from nugget2d.store.record import Record, record_id
from nugget2d.store.search import Hit, Search
from nugget2d.store.words import Words
from nugget2d.text.visible import escaped

if TYPE_CHECKING:  # lists do not wait for torch
    from nugget2d.memory.memory import Memory
    from nugget2d.model import Nugget2D

_DIGITS = re.compile("[0-9a-f]{32}")  # of ids and content addresses, which become parts of paths


class MemoryStore:
    """Memories by content address, with names, tags and owners.

    A record belongs to its `owner`, a namespace: requests with another owner get an error as if it did not exist.
    Requests with None see all. The same memory of two owners is two records of one file.

    Safe to use from several threads and processes at once.
    """

    def __init__(self, path: Path | str, *, create: bool = True, **options: Any) -> None:
        """Open a store.

        Args:
            path: a folder, or "s3://bucket/prefix" for a bucket that exists (extra `s3`).
            create: create the folder if there is none.
            options: of a bucket, passed to obstore's `from_url`: endpoint, access_key_id, secret_access_key, region,
                client_options={"allow_http": True}, ... Others are taken from AWS_... variables.

        Raises:
            StoreError: there is none, it is not a store, of a newer version, or cannot be opened.
            InputError: a path below ~, and there is no home folder.
        """
        scheme = str(path).partition("://")[0].lower()
        if scheme in ("file", "memory"):  # obstore would take them for buckets
            raise StoreError(f"{path} is no bucket; give the folder of a store as a plain path")
        self._backend: Backend = (
            Bucket(str(path), options) if "://" in str(path) else Folder(expand_home(path), create=create)
        )
        self._search = Search(self._backend)

    def put(
        self,
        memory: "Memory",
        *,
        model: "Nugget2D | None" = None,
        key: str | None = None,
        name: str = "",
        tags: Sequence[str] = (),
        owner: str = "",
        settings: CompressOptions | None = None,
        text: str | None = None,
    ) -> Record:
        """Store a memory durably: it survives a power failure after this returns.

        Args:
            memory: to be stored.
            model: the one that made it, to decode its words from its states if there is no `text`.
            key: its content address (`CompressOptions.address`); None takes its checksum.
            name: for display.
            tags: words to filter by.
            owner: its namespace.
            settings: how it was made, for the record.
            text: what it was made of, to be found by its words. Without `text` and `model` only a search with `model`
                finds the memory.

        Returns:
            The record; the existing one, unchanged, if this owner has this memory already. If that one or its file is
            damaged or missing, it is written again under its name and tags.

        Raises:
            InputError: a key that is no content address.
            OutputError: the file cannot be written.
            StoreError: the index cannot be written.
        """
        if key is not None and not _DIGITS.fullmatch(key):
            raise InputError(f"{key!r} is no content address; take that of `CompressOptions.address`")
        record = Record.of(memory, key, name=name, tags=tags, owner=owner, settings=settings)
        words = None
        if text is not None:
            words = Words.of_text(memory, text)
        elif model is not None:
            words = Words.of_states(memory, model)
        return self._backend.keep(Entry(record, b"" if words is None else words.to_bytes()), memory.to_bytes())

    def add(
        self,
        model: "Nugget2D",
        text: str,
        *,
        name: str = "",
        tags: Sequence[str] = (),
        owner: str = "",
        on_progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Record:
        """Store the memory of a text, which is compressed only if the store has no memory of it made in the same way.

        What is damaged or missing of one that it has is written again.

        The arguments are those of `put`; all others are those of `Nugget2D.compress` (method, ratio, dtype, ...), but
        that states are kept as int8 unless `dtype` is given.

        Raises:
            InputError: see `Nugget2D.compress`.
            OutputError, StoreError: see `put`.
        """
        settings = CompressOptions.to_keep(model, **options)
        key = settings.address(text, model)
        if (known := self.at(key, owner=owner)) is not None:
            return known
        memory = self._backend.find(key) or settings.compress(model, [text], on_progress)[0]
        return self.put(memory, model=model, key=key, name=name, tags=tags, owner=owner, settings=settings, text=text)

    def at(self, key: str, *, owner: str = "", verify: bool = True) -> Record | None:
        """The record that `owner` has at a content address (`CompressOptions.address`).

        None if there is none, or if it or its memory is damaged or missing: then `add` and `put` write it again.

        Args:
            key: the address.
            owner: see the class.
            verify: False does not read the memory's file, only looks whether it is there and as long as its states,
                which is quick enough for thousands of them.
        """
        return self._backend.whole(record_id(key, owner), verify=verify)

    def get(self, id: str, *, owner: str | None = None, verify: bool = True) -> "Memory":
        """The memory of a record.

        In a folder its file is mapped into memory: layers are paged in as they are touched, and processes that
        read the same memory share its pages.

        Args:
            id: of the record, whole.
            owner: see the class.
            verify: False skips the checksum, for which the whole file is read.

        Raises:
            UnknownMemoryError: there is no such record, or it is another owner's.
            DamageError: it cannot be read, or its file is missing.
            MemoryFileError: its file is damaged, or another memory's.
        """
        return self._backend.load(self.record(id, owner=owner), verify=verify)

    def record(self, id: str, *, owner: str | None = None) -> Record:
        """The record of that id.

        Raises:
            UnknownMemoryError: there is no such record, or it is another owner's.
            DamageError: it cannot be read.
        """
        record = self._backend.record(id, owner) if _DIGITS.fullmatch(id) else None
        if record is None:
            raise unknown(id)
        return record

    def records(
        self,
        *,
        owner: str | None = None,
        tag: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[Record]:
        """The records of an owner, with a tag, by age.

        Args:
            owner: see the class.
            tag: that they have.
            after: the id of the record before the first one, to go on with a list.
            limit: how many at most.
            newest_first: else the oldest.

        Warns:
            DamageWarning: a record cannot be read and is left out.

        Raises:
            UnknownMemoryError: there is no record `after`, or it is another owner's.
            InputError: a limit below 1.
        """
        page = self.page(Wanted(owner, _kept(tag), after, limit, newest_first))
        for damage in page.damages:
            warn(f"{damage.reason}; the list leaves it out", DamageWarning)
        return page.records

    def page(self, wanted: Wanted) -> Page:
        """What `records` returns, together with what it warns of, and whether there are more.

        Raises:
            UnknownMemoryError, InputError: see `records`.
        """
        if wanted.limit is not None and wanted.limit < 1:
            raise InputError(f"limit must be at least 1, got {wanted.limit}")
        return self._backend.page(wanted)

    def nbytes(self, *, owner: str) -> int:
        """Bytes of an owner's memories (`Record.nbytes`), together."""
        return self._backend.nbytes(owner)

    def matching(self, prefix: str) -> list[str]:
        """The ids that begin so, those of damaged records too."""
        return self._backend.matching(prefix)

    def remove(self, id: str, *, owner: str | None = None) -> None:
        """Remove a record, damaged or not; its file is removed with the last record that points to it.

        Raises:
            UnknownMemoryError: there is no such record, or it is another owner's.
        """
        if not _DIGITS.fullmatch(id) or not self._backend.remove(id, owner):
            raise unknown(id)

    @moved_argument("model")
    def search(
        self,
        query: str,
        *,
        top: int = 10,
        owner: str | None = None,
        tag: str | None = None,
        model: "Nugget2D | None" = None,
    ) -> list[Hit]:
        """The memories most relevant to `query`, best first, each with its best segment.

        Segments are compared by the words of their text where `put` was told it, else by those that `model` decodes
        from their states, once. Case and accents make no difference, nor do endings of English words. Scores (BM25)
        are comparable within one search only; memories without any word of the query are left out. A query without a
        letter, a digit or a sign such as an emoji has no hits.

        Args:
            query: any text.
            top: hits at most.
            owner: see the class.
            tag: only memories with it.
            model: only memories that it can read.

        Warns:
            SearchWarning: memories are left out, because their words are damaged or need their model.

        Raises:
            InputError: an empty query.
            StoreError: SQLite has no full-text search, or the store cannot be read.
        """
        if not query.strip():
            raise InputError("the query is empty; give words to search for")
        return self._search(query, top, owner, _kept(tag), model)

    def place(self, id: str) -> str:
        """Where the file of a record is: a path that `Memory.load` reads, or a place in the bucket.

        Raises:
            UnknownMemoryError: there is no such record.
        """
        return self._backend.place(self.record(id))

    def verify(self) -> list[Damage]:
        """Read and check all memories; returns what is damaged."""
        return self._backend.verify()

    def gc(self) -> Swept:
        """Remove files that interrupted writers left, if they are older than an hour."""
        return self._backend.sweep()

    def close(self) -> None:
        """Close files and connections."""
        self._search.close()
        self._backend.close()

    def __enter__(self) -> "MemoryStore":
        """The store itself, which is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()


def _kept(tag: str | None) -> str | None:
    """A tag as records have it."""
    return None if tag is None else escaped(tag)
