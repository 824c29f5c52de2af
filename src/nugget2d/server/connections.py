"""Connections of bounded number, silence and noise: what uvicorn leaves open.

uvicorn closes a connection that is silent between two requests. Here one that has not sent the whole head of a request
in this time is closed too, whether it sends nothing or a byte now and then, and so is one that does not read its
answer. Of too many connections the one that has waited longest without a request is closed.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from nugget2d.server.context import log

MAX_CONNECTIONS = 1024
IDLE_SECONDS = 10  # without the whole head of a request
STALLED_SECONDS = 60  # without reading what was sent
QUIET_SECONDS = 60  # between two lines of the log about the same failure


class GuardedProtocol(H11Protocol):
    """One connection; uvicorn's `limit_concurrency` is how many there may be, `timeout_keep_alive` how long idle."""

    _stalled: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request of it is being served."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Count it; the time for its first request begins."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            # if none is idle the new one stays, for uvicorn to answer it with 503
            others = [other for other in self.connections if isinstance(other, GuardedProtocol) and other is not self]
            if idle := [other for other in others if other.idle]:
                oldest = min(idle, key=lambda other: other._since)
                self.connections.discard(oldest)  # at once: many may come before the event loop has closed it
                oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes; unless they complete the head of a request, its time goes on."""
        # uvicorn would stop the clock at the first byte
        waiting, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        super().data_received(data)
        if waiting is not None and self.idle:
            self.timeout_keep_alive_task = waiting
        elif waiting is not None:
            waiting.cancel()

    def on_response_complete(self) -> None:
        """A response was sent; the time for the next request begins."""
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._forget_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives its connection."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._forget_stall()

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def max_connections() -> int:
    """As many as this process has file descriptors for; half of them are for files, and for those being refused."""
    try:
        import resource  # of POSIX alone
    except ImportError:
        return MAX_CONNECTIONS // 2
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, descriptors // 2)


class FailureLog:
    """What the event loop calls with failures that belong to no request: one line a minute for each kind."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing was logged yet."""
        self._clock = clock
        self._last: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, failure: dict[str, Any]) -> None:
        """Log a failure, or count it."""
        kind, now = str(failure.get("message")), self._clock()
        if now - self._last.get(kind, -QUIET_SECONDS) < QUIET_SECONDS:
            self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
            return
        self._last[kind] = now
        log("failure", reason=kind, error=repr(failure.get("exception")), unsaid=self._unsaid.pop(kind, 0))
