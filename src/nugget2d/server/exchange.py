"""One request and its response, from the first byte to the line in the log.

`Gate` stands around the whole application: it checks the key before a body is read, reads bodies of bounded size in
bounded time, ends what is done for a client who has left, and writes one JSON line for every request: no text, no key.
"""

import asyncio
import json
import sys
import time
import traceback
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nugget2d.server.failures import Refusal
from nugget2d.server.metrics import Metrics
from nugget2d.server.settings import Keys, Settings

CLIENT_LEFT = 499  # as proxies log it; nobody receives it
PRIVATE = "/v1/"


@dataclass
class Exchange:
    """What is known of a request.

    Attributes:
        owner: whose memories it sees.
        id: for the log and the client (`x-request-id`).
        start: by `time.perf_counter`.
        status: of the response; 499 if the client left before there was one.
        figures: for the log: numbers and words of the server's own.
        ending: called when the exchange is over, however it ends.
    """

    owner: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start: float = field(default_factory=time.perf_counter)
    status: int = CLIENT_LEFT
    figures: dict[str, object] = field(default_factory=dict)
    ending: ExitStack = field(default_factory=ExitStack)

    @staticmethod
    def of(request: Request) -> "Exchange":
        """That of a request inside `Gate`."""
        exchange: Exchange = request.scope["nugget2d.exchange"]
        return exchange

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.start


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        """See the module."""
        self._app, self._settings, self._keys, self._metrics = app, settings, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        owner = self._keys.owner(headers.get("authorization", ""))
        exchange = Exchange(owner or "")
        scope["nugget2d.exchange"] = exchange

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", exchange.id.encode())]
            await send(message)

        try:
            if owner is None and scope["path"].startswith(PRIVATE):
                raise Refusal(401, "no valid API key: send the header 'Authorization: Bearer KEY'", "invalid_api_key")
            body = await self._body(headers.get("content-length", ""), receive)
            await self._serve(scope, body, receive, answer)
        except Refusal as refusal:
            await refusal.response()(scope, receive, answer)
        except Exception:  # the client has its error already; the reason is for whoever runs the server
            exchange.figures["error"] = traceback.format_exc()
        finally:
            exchange.ending.close()
            self._report(scope, exchange)

    async def _serve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application until it is done or its client has left."""
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                await gone.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        gone = asyncio.Event()
        watching = asyncio.ensure_future(watch())
        serving = asyncio.ensure_future(self._app(scope, replay, send))
        try:
            await asyncio.wait({watching, serving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
        finally:
            serving.cancel()
            watching.cancel()

    async def _body(self, length: str, receive: Receive) -> bytes:
        """The body of a request, as large as is allowed."""
        most = self._settings.max_bytes
        too_large = Refusal(413, f"the request is larger than {most:,} bytes, which is what the server takes")
        if length.isdigit() and int(length) > most:
            raise too_large
        chunks: list[bytes] = []

        async def collect() -> None:
            more, size = True, 0
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(CLIENT_LEFT, "the client left")
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > most:
                    raise too_large
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(collect(), self._settings.seconds)
        except asyncio.TimeoutError as error:
            raise Refusal(408, "the request did not arrive in time", "time_limit") from error
        return b"".join(chunks)

    def _report(self, scope: Scope, exchange: Exchange) -> None:
        route = getattr(scope.get("route"), "path", "none")  # as declared: an id is no label
        self._metrics.requests.labels(route, str(exchange.status)).inc()
        self._metrics.seconds.labels(route).observe(exchange.seconds)
        seconds = round(exchange.seconds, 4)
        named = {"id": exchange.id, "method": scope["method"], "route": route, "status": exchange.status}
        log("request", **named, seconds=seconds, **exchange.figures)


def log(event: str, **figures: object) -> None:
    """One JSON line on standard error."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": event, **figures}), file=sys.stderr, flush=True)
