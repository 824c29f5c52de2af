"""`RequestContext`: the state of a request while it is served, and its log line."""

import json
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone

from starlette.requests import Request

from nugget2d.server.shortening import shortened

CLIENT_LEFT = 499  # as proxies log it; it is never sent
_LOGGED = 8000  # characters of a value: a traceback has some thousand


@dataclass
class RequestContext:
    """What is known of a request.

    Attributes:
        owner: whose memories it sees.
        id: for the log and the client (`x-request-id`).
        start: by `time.perf_counter`.
        status: of the response; 499 if the client left before there was one.
        metrics: for the log: numbers and words of the server's own.
        ending: called when the request is over, however it ends.
    """

    owner: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start: float = field(default_factory=time.perf_counter)
    status: int = CLIENT_LEFT
    metrics: dict[str, object] = field(default_factory=dict)
    ending: ExitStack = field(default_factory=ExitStack)

    @staticmethod
    def of(request: Request) -> "RequestContext":
        """That of a request inside the middleware."""
        context: RequestContext = request.scope["nugget2d.context"]
        return context

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.start


def log(event: str, **metrics: object) -> None:
    """One JSON line of bounded length on standard error."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = {name: shortened(value, _LOGGED) if isinstance(value, str) else value for name, value in metrics.items()}
    print(json.dumps({"time": now, "event": event, **line}), file=sys.stderr, flush=True)
