"""Errors as clients of the OpenAI API expect them: {"error": {"message", "type", "param", "code"}}.

Only what a client caused is explained; of the server's own failures it learns nothing but that there was one.
"""

from pydantic import BaseModel
from starlette.responses import JSONResponse

from nugget2d.errors import (
    InputError,
    LimitError,
    MismatchError,
    ModelError,
    OverloadError,
    ShutdownError,
    TimeLimitError,
    UnknownMemoryError,
)


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorDetail


class APIError(Exception):
    """An error with its HTTP status, ready to be sent."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        """`message` is for the client's eyes."""
        super().__init__(message)
        self.status = status
        # a lone surrogate in what a client sent could not be sent back
        message = message.encode(errors="backslashreplace").decode()
        self.body = ErrorBody(error=ErrorDetail(message=message, type=_type(status), param=param, code=code))

    def response(self) -> JSONResponse:
        """The response."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "10"}}
        return JSONResponse(self.body.model_dump(), self.status, headers.get(self.status))


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
    if isinstance(error, TimeLimitError):
        return APIError(504, message, "time_limit")
    return APIError(500, "the server failed on this request; its log has the reason")


def documented(*statuses: int) -> dict[int | str, dict[str, object]]:
    """For the OpenAPI document: these statuses have the body of an error."""
    return {status: {"model": ErrorBody} for status in statuses}


def _type(status: int) -> str:
    named = {401: "authentication_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")
