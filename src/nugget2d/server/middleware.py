"""The middleware around the whole application: one request and its response, from the first byte to its log line.

It refuses pages of others and unknown keys before a body is read, bounds what is read, ends what is done for a client
who has left or when the server ends, and writes one JSON line for every request: no text, no key.
"""

import asyncio
import traceback

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nugget2d.errors import ShutdownError
from nugget2d.server.api_errors import APIError, api_error
from nugget2d.server.browsers import refuse_strangers
from nugget2d.server.context import RequestContext, log
from nugget2d.server.limits import Room
from nugget2d.server.messages import Incoming, Outgoing
from nugget2d.server.metrics import Metrics
from nugget2d.server.settings import Keys, Settings

PRIVATE = "/v1/"


class Middleware:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, metrics: Metrics, room: Room) -> None:
        """See the module."""
        self._app, self._settings, self._keys, self._metrics, self._room = app, settings, keys, metrics, room
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Fail every request that is not done."""
        self._ended.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, method = Headers(scope=scope), scope["method"]
        owner = self._keys.owner(headers.get("authorization", ""))
        context = RequestContext(owner or "", self._settings.seconds, self._room.share())
        # the server sends no body where it was asked by HEAD; its own scope keeps that method
        scope = {**scope, "nugget2d.context": context, "method": "GET" if method == "HEAD" else method}
        outgoing = Outgoing(send, context)
        try:
            refuse_strangers(headers, self._settings)
            if owner is None and scope["path"].startswith(PRIVATE):
                raise APIError(401, "no valid API key: send the header 'Authorization: Bearer KEY'", "invalid_api_key")
            length = headers.get("content-length", "")
            incoming = Incoming(receive, context, length, most=self._settings.max_bytes)
            await self._serve(scope, incoming, outgoing)
        except (APIError, ShutdownError) as error:
            await outgoing.fail(api_error(error))
        except Exception:  # the client has its error already; the reason is for the operator
            context.metrics["error"] = traceback.format_exc()
        finally:
            context.end()
            self._report(scope, method, context)

    async def _serve(self, scope: Scope, incoming: Incoming, outgoing: Outgoing) -> None:
        """Run the application until it is done, its client has left, or the server ends."""
        serving = asyncio.ensure_future(self._app(scope, incoming.receive, outgoing.send))
        leaving = asyncio.ensure_future(incoming.gone.wait())
        ending = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({serving, leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
            elif not leaving.done():
                raise ShutdownError("the server was shut down before this was done; ask again")
        finally:
            for task in (serving, leaving, ending):
                task.cancel()
            incoming.close()
            await asyncio.wait({serving})  # it sends no more

    def _report(self, scope: Scope, method: str, context: RequestContext) -> None:
        route = getattr(scope.get("route"), "path", "none")  # as declared: an id is no label
        self._metrics.requests.labels(route, str(context.status)).inc()
        self._metrics.seconds.labels(route).observe(context.seconds)
        seconds = round(context.seconds, 4)
        named = {"id": context.id, "method": method, "route": route, "status": context.status}
        log("request", **named, seconds=seconds, **context.metrics)
