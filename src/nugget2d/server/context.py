"""`RequestContext`: the state of a request while it is served, and its log line."""

import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from starlette.requests import Request

from nugget2d.memory.memory import Memory
from nugget2d.server.limits import Share
from nugget2d.server.shortening import shortened

CLIENT_LEFT = 499  # as proxies log it; it is never sent
_LOGGED = 8000  # characters of a value: a traceback has some thousand


@dataclass
class RequestContext:
    """What is known of a request.

    Attributes:
        owner: whose memories it sees.
        limit: seconds that it may take.
        held: bytes that it holds.
        id: for the log and the client (`x-request-id`).
        start: by `time.perf_counter`.
        status: of the response; 499 if the client left before there was one.
        metrics: for the log: numbers and words of the server's own.
        memories: that it reads, as they are stored: while they are here, other requests read the same.
        over: it has ended, whatever is still done for it.
    """

    owner: str
    limit: float
    held: Share
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start: float = field(default_factory=time.perf_counter)
    status: int = CLIENT_LEFT
    metrics: dict[str, object] = field(default_factory=dict)
    memories: Sequence[Memory] = ()
    over: bool = False
    _calls: list[Callable[[], None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def of(request: Request) -> "RequestContext":
        """That of a request inside the middleware."""
        context: RequestContext = request.scope["nugget2d.context"]
        return context

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds that it still has."""
        return self.limit - self.seconds

    def at_end(self, call: Callable[[], None]) -> None:
        """Call it when the request is over, however it ends; at once if it is. From any thread."""
        with self._lock:
            if not self.over:
                self._calls.append(call)
                return
        call()

    def end(self) -> None:
        """The request is over."""
        with self._lock:
            self.over = True
            calls, self._calls, self.memories = self._calls, [], ()  # a connection keeps its last request
        for call in [self.held.close, *calls]:
            call()


def log(event: str, **metrics: object) -> None:
    """One JSON line of bounded length on standard error."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = {name: shortened(value, _LOGGED) if isinstance(value, str) else value for name, value in metrics.items()}
    print(json.dumps({"time": now, "event": event, **line}), file=sys.stderr, flush=True)
