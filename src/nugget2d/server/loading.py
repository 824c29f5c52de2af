"""Stored memories for the requests that read them: each is loaded once, however many name it."""

import threading
from weakref import WeakValueDictionary

from nugget2d.memory.memory import Memory
from nugget2d.store import MemoryStore, Record


class Loader:
    """Memories of a store, shared as long as somebody reads them."""

    def __init__(self, store: MemoryStore) -> None:
        """Nothing is loaded yet."""
        self._store = store
        self._memories: WeakValueDictionary[str, Memory] = WeakValueDictionary()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, record: Record) -> Memory:
        """The memory of a record, which its owner asks for.

        Raises:
            UnknownMemoryError, StoreError, MemoryFileError: see `MemoryStore.get`.
        """
        with self._lock:
            lock = self._locks.setdefault(record.key, threading.Lock())
        with lock:  # whoever asks meanwhile waits for the same one
            memory = self._memories.get(record.key)
            if memory is None:
                memory = self._store.get(record.id, owner=record.owner)
                self._memories[record.key] = memory
            return memory
