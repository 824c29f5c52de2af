"""The middleware around the whole application: one request and its response, from the first byte to its log line.

It checks the key before a body is read, reads bodies of bounded size in bounded time, ends what is done for a client
who has left, and writes one JSON line for every request: no text, no key.
"""

import asyncio
import traceback

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nugget2d.errors import LimitError, OverloadError
from nugget2d.server.api_errors import APIError, api_error
from nugget2d.server.context import CLIENT_LEFT, RequestContext, log
from nugget2d.server.costs import BODY
from nugget2d.server.limits import Room, Share
from nugget2d.server.metrics import Metrics
from nugget2d.server.settings import Keys, Settings

PRIVATE = "/v1/"


class Middleware:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, metrics: Metrics, room: Room) -> None:
        """See the module."""
        self._app, self._settings, self._keys, self._metrics, self._room = app, settings, keys, metrics, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        owner = self._keys.owner(headers.get("authorization", ""))
        context = RequestContext(owner or "", self._settings.seconds, self._room.share())
        scope["nugget2d.context"] = context

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", context.id.encode())]
            await send(message)

        try:
            if owner is None and scope["path"].startswith(PRIVATE):
                raise APIError(401, "no valid API key: send the header 'Authorization: Bearer KEY'", "invalid_api_key")
            body = await self._body(headers.get("content-length", ""), receive, context.held)
            await self._serve(scope, body, receive, answer)
        except (APIError, LimitError, OverloadError) as error:
            await api_error(error).response()(scope, receive, answer)
        except Exception:  # the client has its error already; the reason is for the operator
            context.metrics["error"] = traceback.format_exc()
        finally:
            context.end()
            self._report(scope, context)

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

    async def _body(self, length: str, receive: Receive, held: Share) -> bytes:
        """The body of a request, as large as is allowed."""
        most = self._settings.max_bytes
        too_large = APIError(413, f"the request is larger than {most:,} bytes, which is what the server takes")
        if length.isdigit() and int(length) > most:
            raise too_large
        chunks: list[bytes] = []

        async def collect() -> None:
            more, size = True, 0
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise APIError(CLIENT_LEFT, "the client left")
                chunks.append(message.get("body", b""))
                held.take(BODY * len(chunks[-1]))
                size += len(chunks[-1])
                if size > most:
                    raise too_large
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(collect(), self._settings.seconds)
        except asyncio.TimeoutError as error:
            raise APIError(408, "the request did not arrive in time", "time_limit") from error
        return b"".join(chunks)

    def _report(self, scope: Scope, context: RequestContext) -> None:
        route = getattr(scope.get("route"), "path", "none")  # as declared: an id is no label
        self._metrics.requests.labels(route, str(context.status)).inc()
        self._metrics.seconds.labels(route).observe(context.seconds)
        seconds = round(context.seconds, 4)
        named = {"id": context.id, "method": scope["method"], "route": route, "status": context.status}
        log("request", **named, seconds=seconds, **context.metrics)
