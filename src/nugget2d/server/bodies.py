"""Bodies of requests: bounded by what they hold, and JSON is parsed away from the event loop.

Bytes alone are no bound: 16 MB of `{},{},...` are millions of objects, each to be made, checked and refused.
"""

from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from nugget2d.server.api_errors import APIError

MOST_VALUES = 1 << 15  # a chat of 4,096 messages of one part each has 24,600


class _BoundedRequest(Request):
    """A request whose JSON is read by `parse`."""

    async def json(self) -> Any:
        """Its body as objects."""
        if not hasattr(self, "_json"):
            self._json = await run_in_threadpool(parse, await self.body())
        return self._json


class BoundedRoute(APIRoute):
    """A route whose bodies are bounded."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            if self.body_field is not None:
                _require_kind(request.headers.get("content-type"))
            return await handle(_BoundedRequest(request.scope, request.receive))

        return answer


def _require_kind(content_type: str | None) -> None:
    """Forms of other kinds have no file, and other charsets may take minutes to decode (Punycode does)."""
    kind, parameters = parse_options_header(content_type)
    known = kind in (b"application/json", b"multipart/form-data") or kind.endswith(b"+json")
    if not known or parameters.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise APIError(415, "send application/json, or a file as multipart/form-data (curl -F); both in UTF-8")


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
        return from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=False)
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
