"""A store of memories: deduplicated by content address, durable once acknowledged, searchable by words."""

from nugget2d.store.backend import Damage, Page, Swept, Wanted
from nugget2d.store.record import Record
from nugget2d.store.search import Hit
from nugget2d.store.store import MemoryStore

__all__ = ["Damage", "Hit", "MemoryStore", "Page", "Record", "Swept", "Wanted"]
