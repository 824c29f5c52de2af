"""`Search`: brings the index of words (fulltext.py) up to date with a store's records, and asks it."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from nugget2d.errors import NuggetError, SearchWarning, StoreError, warn
from nugget2d.store.backend import Backend, Damage, Entry
from nugget2d.store.fulltext import Emptied, FullText, Indexed, Scope, fingerprint_of
from nugget2d.store.record import Record
from nugget2d.store.words import Words, are_tokens

if TYPE_CHECKING:  # a search without a model does without torch
    from nugget2d.model import Nugget2D

BATCH = 500  # records added in one transaction
SHOWN = 3  # ids that a warning names
# why a record has no words, and what a search says of it
DAMAGED, UNREAD = "damaged", "unread"
REASONS = {
    DAMAGED: "what they are searched by is damaged; add their texts again",
    UNREAD: "only their model can tell their words; give it once (--model, or model=)",
}


class Hit(NamedTuple):
    """A memory that a search found: `start` and `end` are the characters of the part that matched best."""

    record: Record
    score: float
    start: int
    end: int


class Search:
    """Searches the memories of a store by words."""

    def __init__(self, backend: Backend) -> None:
        """Nothing is read yet."""
        self._backend = backend
        self._index = FullText(backend.words_file)

    def __call__(self, query: str, top: int, owner: str | None, tag: str | None, model: "Nugget2D | None") -> list[Hit]:
        """See `MemoryStore.search`."""
        while True:  # a file is replaced once at most, and by memory once
            try:
                self._update()
                scope = Scope(owner, tag, None if model is None else self._readers(model))
                if model is not None:
                    self._read(model, scope)
                hits = list(islice(self._hits(query, scope), top))
                self._warn(scope)
                return hits
            except Emptied:
                continue

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def _update(self) -> None:
        """Add what is new, or was damaged; remove what is gone, or was written again, maybe with other tags."""
        # in this order: what another process adds to both in between is not taken for gone
        states = self._index.states()
        there = self._backend.versions()
        self._index.remove([id for id, (version, _) in states.items() if there.get(id) != version])
        new = [id for id, version in there.items() if states.get(id) not in ((version, ""), (version, UNREAD))]
        for start in range(0, len(new), BATCH):
            entries = self._backend.entries(new[start : start + BATCH])
            self._index.add([_indexed(entry, there) for entry in entries])

    def _readers(self, model: "Nugget2D") -> list[str]:
        return [reader for reader in self._index.readers() if model.recognizes(fingerprint_of(reader))]

    def _read(self, model: "Nugget2D", scope: Scope) -> None:
        """Index what was kept without words, or by an earlier version with token ids."""
        for id, version, state in self._index.left_out(scope):
            if state == UNREAD:
                self._index.add([self._decoded(entry, version, model) for entry in self._backend.entries([id])])

    def _decoded(self, entry: Entry | Damage, version: str, model: "Nugget2D") -> Indexed:
        if isinstance(entry, Damage):
            return Indexed(entry.id, version, None, DAMAGED)
        id, record = entry.record.id, entry.record
        try:
            memory = self._backend.load(record, verify=True)
            words = Words.of_tokens(entry.words, memory, model) if entry.words else Words.of_states(memory, model)
        except NuggetError:
            return Indexed(id, version, record, DAMAGED)
        return Indexed(id, version, record, words)

    def _hits(self, query: str, scope: Scope) -> Iterator[Hit]:
        for found in self._index.search(query, scope):
            with suppress(StoreError):  # damaged just now
                if (record := self._backend.record(found.id)) is not None:  # else removed just now
                    yield Hit(record, found.score, found.start, found.end)

    def _warn(self, scope: Scope) -> None:
        left_out = self._index.left_out(scope)
        for state, reason in REASONS.items():
            if ids := [id for id, _, theirs in left_out if theirs == state]:
                more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
                warn(f"not searched: {', '.join(ids[:SHOWN])}{more}: {reason}", SearchWarning)


def _indexed(entry: Entry | Damage, versions: Mapping[str, str]) -> Indexed:
    """What the index needs to know of a record."""
    if isinstance(entry, Damage):
        return Indexed(entry.id, versions[entry.id], None, DAMAGED)
    record, words = entry.record, entry.words
    version = versions[record.id]
    if not words or are_tokens(words):
        return Indexed(record.id, version, record, UNREAD)
    try:
        return Indexed(record.id, version, record, Words.from_bytes(words))
    except StoreError:
        return Indexed(record.id, version, record, DAMAGED)
