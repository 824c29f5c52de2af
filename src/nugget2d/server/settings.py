"""Settings of a server, and its API keys."""

import hashlib
import hmac
from collections.abc import Sequence
from ipaddress import ip_address

from pydantic import Field

from nugget2d.config import Frozen
from nugget2d.server.limits import default_memory

NAME = r"\[[0-9a-f:.]+\]|[^\s:/?#@*\[\]]+"  # of a host, in lower case: a pattern


class Settings(Frozen):
    """Limits of a server, each for a reason of its own.

    Attributes:
        name: how clients call the model.
        max_context: tokens of a prompt that are read uncompressed; of a longer one all but the last part is compressed.
        ratio: tokens for each nugget, where a client does not say.
        max_tokens: of an answer.
        max_num_seqs: sequence slots: requests that run side by side; each holds a cache.
        queue: requests that wait for a sequence slot; more are refused (429).
        seconds: a request may take; it fails after that (504).
        max_bytes: of a request (413).
        max_input: tokens of a request's texts, compressed or not (413).
        max_memory: bytes that all requests may hold together: half of them in caches of running answers, half in all
            else, above all bodies and memories; 413 for a request that is too large for it, 429 while others hold it.
        max_stored: bytes of memories that an owner may keep (413); None is no limit.
        grace: seconds that running requests get at shutdown.
        host: the address it listens on.
        allow_hosts: names besides loopback's by which it may be asked, and whose pages may ask it.
    """

    name: str
    max_context: int = Field(ge=8)
    ratio: float = Field(default=10, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    max_num_seqs: int = Field(default=16, ge=1)
    queue: int = Field(default=64, ge=0)
    seconds: float = Field(default=120, gt=0)
    max_bytes: int = Field(default=16 << 20, ge=1024)
    max_input: int = Field(default=1 << 17, ge=8)
    max_memory: int = Field(default_factory=default_memory, ge=1 << 20)
    max_stored: int | None = Field(default=None, ge=0)
    grace: float = Field(default=30, ge=0)
    host: str = "127.0.0.1"
    allow_hosts: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        """Whether it listens on loopback."""
        return is_loopback(self.host)


class Keys:
    """Who may ask. Each key has an owner name: its digest, under which its memories are stored; never the key."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Without keys everyone may ask, and all are one owner."""
        # an environment variable may hold other bytes than UTF-8
        self._owners = [_digest(key.encode(errors="surrogateescape")) for key in keys]

    @property
    def asked(self) -> bool:
        """Whether there are any."""
        return bool(self._owners)

    @property
    def several(self) -> bool:
        """Whether there are owners to be told apart."""
        return len(set(self._owners)) > 1

    def owner(self, authorization: str) -> str | None:
        """The owner that an Authorization header (read as Latin-1) identifies; None if the key is unknown.

        All keys are compared, each in constant time, so that timing reveals nothing about them.
        """
        if not self._owners:
            return ""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip(" \t").encode("latin-1"))  # the bytes that were sent
        found = [owner for owner in self._owners if hmac.compare_digest(owner, given)]
        return found[0] if found and scheme.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Whether a name or address is of this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
