"""A store keeps many memories: never the same work twice, none lost once acknowledged, found again by what they say."""

from nugget2d.store.backend import Damage, Swept
from nugget2d.store.record import Record
from nugget2d.store.store import Hit, MemoryStore

__all__ = ["Damage", "Hit", "MemoryStore", "Record", "Swept"]
