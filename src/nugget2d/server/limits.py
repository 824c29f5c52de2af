"""What requests may take together: bytes of the machine's memory, places in the server, bytes of an owner's store.

Each is taken before the work that needs it, and given back when the request is over, however it ends.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nugget2d.errors import LimitError, OverloadError, ShutdownError

CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container: fewer bytes than the machine has


class Room:
    """Bytes that all requests may hold together."""

    def __init__(self, most: int) -> None:
        """At most so many."""
        self.most = most
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held

    def share(self) -> "Share":
        """What a new request holds: nothing yet."""
        return Share(self)

    def change(self, before: int, after: int) -> None:
        """A request that holds `before` bytes will hold `after`.

        Raises:
            LimitError: more than there are.
            OverloadError: more than others leave.
        """
        if after > self.most:
            raise LimitError(
                f"the request needs about {after:,} bytes of memory, the server has {self.most:,} for requests; "
                "send less, name fewer memories, or ask for fewer tokens"
            )
        with self._lock:
            if after > before and self._held - before + after > self.most:
                raise OverloadError(
                    f"the request needs about {after:,} bytes of memory, of {self.most:,} for requests "
                    f"{self._held - before:,} are in use; try again later"
                )
            self._held += after - before


class Share:
    """Bytes of a `Room` that one request holds; its event loop and its work in a thread may change it at once."""

    def __init__(self, room: Room) -> None:
        """Nothing yet."""
        self._room, self._nbytes = room, 0
        self._closed = False
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        """Hold so many more.

        Raises:
            LimitError, OverloadError: see `Room.change`.
            ShutdownError: the request is over.
        """
        with self._lock:
            if self._closed:
                raise ShutdownError("the request is over")
            self._change(self._nbytes + nbytes)

    def give(self, nbytes: int) -> None:
        """Hold so many less, if the request is not over."""
        with self._lock:
            self._change(max(0, self._nbytes - nbytes))

    def close(self) -> None:
        """Hold nothing, from now on."""
        with self._lock:
            self._closed = True
            self._change(0)

    def _change(self, nbytes: int) -> None:
        self._room.change(self._nbytes, nbytes)
        self._nbytes = nbytes


class Places:
    """Places of requests, from their arrival to the end of their work: for those who run and those who wait.

    With several keys, an owner who has as many places as are free gets no more. So whoever holds one leaves the last
    for those who hold none.
    """

    def __init__(self, most: int, *, several_keys: bool) -> None:
        """So many places."""
        self._most, self._several = most, several_keys
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, owner: str) -> Callable[[], None]:
        """A place for a request of `owner`; what is returned gives it back, once.

        Raises:
            OverloadError: there is none.
        """
        with self._lock:
            taken, mine = self._held.total(), self._held[owner]
            if taken >= self._most:
                raise OverloadError(f"{taken} requests are running or waiting already; try again later")
            if self._several and mine and mine >= self._most - taken:
                raise OverloadError(
                    f"{mine} requests of this key are running or waiting already; the {self._most - taken} places that "
                    "are free are for other keys; try again later"
                )
            self._held[owner] += 1
        given = False

        def give() -> None:
            nonlocal given
            with self._lock:
                if not given:
                    given = True
                    self._held[owner] -= 1
                    self._held += Counter()  # owners without a place are forgotten

        return give


class Quota:
    """Bytes of memories that an owner may keep; those that are being made count too."""

    def __init__(self, most: int | None) -> None:
        """At most so many; None is no limit."""
        self._most = most
        self._coming: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, owner: str, nbytes: int, stored: Callable[[], int]) -> Callable[[], None]:
        """Room for a memory of so many bytes that will be stored; what is returned gives it back.

        Args:
            owner: whose it will be.
            nbytes: its size.
            stored: says how many bytes the owner has already.

        Raises:
            LimitError: there is no room.
        """
        if self._most is None:
            return lambda: None
        with self._lock:
            kept = stored() + self._coming[owner]
            if kept + nbytes > self._most:
                raise LimitError(
                    f"the memory would take {nbytes:,} bytes, {kept:,} of {self._most:,} are taken; delete memories, "
                    "or compress more"
                )
            self._coming[owner] += nbytes

        def give() -> None:
            with self._lock:
                self._coming[owner] -= nbytes
                self._coming += Counter()

        return give


def default_memory() -> int:
    """Half of the bytes that this machine has, or this container."""
    nbytes = 8 << 30  # where the system does not say
    with suppress(AttributeError, OSError, ValueError):
        nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no container, or "max"
        nbytes = min(nbytes, int(CGROUP.read_text()))
    return nbytes // 2
