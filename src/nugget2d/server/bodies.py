"""Bodies of JSON: bounded by what they hold, and parsed away from the event loop.

Bytes alone are no bound: 16 MB of `{},{},...` are millions of objects, each to be made, checked and refused.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from nugget2d.server.api_errors import APIError

MOST_VALUES = 1 << 15  # a chat of 4,096 messages with two parts each has 29,000


class JSONRequest(Request):
    """A request whose JSON is read by `parse`."""

    async def json(self) -> Any:
        """Its body as objects."""
        if not hasattr(self, "_json"):
            self._json = await run_in_threadpool(parse, await self.body())
        return self._json


class JSONRoute(APIRoute):
    """A route that gets a `JSONRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(JSONRequest(request.scope, request.receive))

        return answer


def parse(body: bytes) -> Any:
    """The value that a body of JSON stands for.

    Raises:
        APIError: it is no JSON, not in UTF-8, nested too deeply, or holds more than `MOST_VALUES` values.
    """
    if _holds_more(body, MOST_VALUES):
        raise APIError(
            413, f"the body holds more than {MOST_VALUES:,} values; send fewer in a request", "too_many_values"
        )
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise APIError(422, f"the body is no JSON in UTF-8: {error}", "invalid_json") from error


def _holds_more(body: bytes, most: int) -> bool:
    """Whether lists and objects have more items than `most`, by the commas and brackets outside of strings.

    Each step is a single pass of a built-in function: 16 MB take less than 0.1 s, whatever they are.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a string
    if plain.count(b'"') > 4 * most:  # the two of a key and the two of its value
        return True
    outside = b"".join(plain.split(b'"')[::2])
    return outside.count(b",") + outside.count(b"{") + outside.count(b"[") > most
