"""Errors as clients of the OpenAI API expect them: {"error": {"message", "type", "param", "code"}}.

Only what a client caused is explained; of the server's own failures it learns nothing but that there was one.
"""

from collections.abc import Mapping

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from nugget2d.errors import (
    DamageError,
    InputError,
    LimitError,
    MemoryFileError,
    MismatchError,
    ModelError,
    OverloadError,
    ShutdownError,
    StoreGoneError,
    TimeLimitError,
    UnknownMemoryError,
)
from nugget2d.server.shortening import shortened


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorDetail


class APIError(HTTPException):
    """An error with its HTTP status, ready to be sent.

    (An `HTTPException`, as FastAPI passes on no other that is raised while a body is read.)
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`message` is for the client's eyes; of what a client sent, it and `param` repeat a part at most."""
        super().__init__(status, _told(message), headers or _HEADERS.get(status))
        param = None if param is None else _told(param)
        detail = ErrorDetail(message=self.detail, type=_type(status), param=param, code=code)
        self.status, self.body = status, ErrorBody(error=detail)

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)

    def event(self) -> str:
        """The last event of a stream that fails."""
        return server_sent(self.body)


def server_sent(body: BaseModel) -> str:
    """An event of a stream; in ASCII, as some clients take U+2028 or U+0085 for the end of a line."""
    return f"data: {body.model_dump_json(ensure_ascii=True)}\n\n"


def api_error(error: Exception) -> APIError:
    """What a client is told of an error."""
    if isinstance(error, APIError):
        return error
    message = str(error)
    if isinstance(error, UnknownMemoryError):
        return APIError(404, message, "memory_not_found")
    if isinstance(error, MismatchError):  # its message names models, by folders perhaps
        return APIError(400, "a memory was made by another model than the one served here; compress its text again")
    if isinstance(error, (InputError, ModelError)):
        return APIError(400, message)
    if isinstance(error, LimitError):
        return APIError(413, message, "too_large")
    if isinstance(error, OverloadError):
        return APIError(429, message, "queue_full")
    if isinstance(error, ShutdownError):
        return APIError(503, message, "shutting_down")
    if isinstance(error, (DamageError, MemoryFileError)):  # their messages name files
        return APIError(500, "a memory is damaged or lost; add its text again, or delete it", "memory_damaged")
    if isinstance(error, StoreGoneError):  # here, too
        return APIError(503, "the server's store is gone; nothing can be read or kept until it is back", "store_gone")
    if isinstance(error, TimeLimitError):
        return APIError(504, message, "time_limit")
    return APIError(500, "the server failed on this request; its log has the reason")


def documented(*statuses: int) -> dict[int | str, dict[str, object]]:
    """For the OpenAPI document: these statuses have the body of an error."""
    return {status: {"model": ErrorBody} for status in statuses}


_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "10"}}


def _told(text: str) -> str:
    """Short, and without lone surrogates (the name of a file may have them), which cannot be sent."""
    return shortened(text).encode(errors="backslashreplace").decode()


def _type(status: int) -> str:
    named = {401: "authentication_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")
