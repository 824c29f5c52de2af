"""One request and its response as they pass: how much of it there is, and how it stands."""

import asyncio

from starlette.types import Message, Receive, Send

from nugget2d.errors import NuggetError
from nugget2d.server.api_errors import APIError, api_error
from nugget2d.server.context import CLIENT_LEFT, RequestContext
from nugget2d.server.costs import BODY


class Incoming:
    """What a client sends: a body of bounded size in bounded time, read only by those who use it.

    Attributes:
        gone: the client has left. Known from the end of the body on; before it, `receive` raises.
    """

    def __init__(self, receive: Receive, context: RequestContext, length: str, *, most: int) -> None:
        """At most `most` bytes, `length` by the client's word, in the time and the memory that the request has."""
        self.gone = asyncio.Event()
        self._receive, self._context, self._length, self._most = receive, context, length, most
        self._size = 0
        self._watching: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        """More of the body; after all of it, that the client has left, once that is so.

        Raises:
            APIError: it is too large, too little memory is left for it, it takes too long, or the client leaves in
                the middle.
        """
        if self._watching is not None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        self._bound(int(self._length) if self._length.isdecimal() else 0)
        try:
            message = await asyncio.wait_for(self._receive(), self._context.left)
        except asyncio.TimeoutError as error:
            raise APIError(408, "the request did not arrive in time", "time_limit") from error
        if message["type"] == "http.disconnect":
            raise APIError(CLIENT_LEFT, "the client left")
        self._size += len(message.get("body", b""))
        self._bound(self._size)
        try:
            self._context.held.take(BODY * len(message.get("body", b"")))
        except NuggetError as error:  # FastAPI would hide it
            raise api_error(error) from error
        if not message.get("more_body", False):
            self._watching = asyncio.ensure_future(self._watch())
        return message

    def close(self) -> None:
        """Watch no longer."""
        if self._watching is not None:
            self._watching.cancel()

    def _bound(self, size: int) -> None:
        if size > self._most:
            raise APIError(413, f"the request is larger than {self._most:,} bytes, which is what the server takes")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()


class Outgoing:
    """What a client gets."""

    def __init__(self, send: Send, context: RequestContext) -> None:
        """The response of a request, by its `context`."""
        self._send, self._context = send, context
        self._started = self._streams = self._complete = False

    async def send(self, message: Message) -> None:
        """More of the response."""
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), (b"x-request-id", self._context.id.encode())]
            self._context.status, self._started = message["status"], True
            self._streams = any(b"text/event-stream" in value for _, value in headers)
            message["headers"] = headers
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    async def fail(self, error: APIError) -> None:
        """End with an error: as a whole response, or in a stream that has begun as its last event."""
        if not self._started:
            response = error.response()
            await self.send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
            await self.send({"type": "http.response.body", "body": response.body})
        elif self._streams and not self._complete:
            await self.send({"type": "http.response.body", "body": error.event().encode()})
