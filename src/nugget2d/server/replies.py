"""Answers in the two forms of the OpenAI API, whole or as server-sent events."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response, StreamingResponse

from nugget2d.server.api_errors import api_error, server_sent
from nugget2d.server.context import RequestContext
from nugget2d.server.events import ContextSize, Event, Finished, Text
from nugget2d.server.metrics import Metrics
from nugget2d.server.schemas import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChoice,
    Delta,
    DeltaChoice,
    PromptDetails,
    Usage,
)

Reason = Literal["stop", "length"]


class Reply(ABC):
    """How one answer is put into words for its client; `prefix` begins its id."""

    prefix: str

    def __init__(self, model: str) -> None:
        """An answer of `model`, from now."""
        identity = f"{self.prefix}-{uuid.uuid4().hex}"
        self.common: dict[str, Any] = {"id": identity, "created": int(time.time()), "model": model}

    @abstractmethod
    def whole(self, text: str, reason: Reason, usage: Usage) -> BaseModel:
        """All of it."""

    def first(self) -> BaseModel | None:
        """What a stream begins with, before there is any text; None: nothing."""
        return None

    @abstractmethod
    def chunk(self, text: str, reason: Reason | None) -> BaseModel:
        """More of it."""

    @abstractmethod
    def end(self, usage: Usage) -> BaseModel:
        """What follows the last chunk, for clients that asked for it."""


class CompletionReply(Reply):
    """For `/v1/completions`."""

    prefix = "cmpl"

    def whole(self, text: str, reason: Reason, usage: Usage) -> Completion:
        """See `Reply`."""
        return Completion(**self.common, choices=[CompletionChoice(text=text, finish_reason=reason)], usage=usage)

    def chunk(self, text: str, reason: Reason | None) -> Completion:
        """See `Reply`."""
        return Completion(**self.common, choices=[CompletionChoice(text=text, finish_reason=reason)])

    def end(self, usage: Usage) -> Completion:
        """See `Reply`."""
        return Completion(**self.common, choices=[], usage=usage)


class ChatReply(Reply):
    """For `/v1/chat/completions`."""

    prefix = "chatcmpl"

    def whole(self, text: str, reason: Reason, usage: Usage) -> ChatCompletion:
        """See `Reply`."""
        choice = ChatChoice(message=Answer(content=text), finish_reason=reason)
        return ChatCompletion(**self.common, choices=[choice], usage=usage)

    def first(self) -> ChatChunk:
        """Whose turn it is: clients put the deltas together, so it is said once."""
        return ChatChunk(**self.common, choices=[DeltaChoice(delta=Delta(role="assistant", content=""))])

    def chunk(self, text: str, reason: Reason | None) -> ChatChunk:
        """See `Reply`."""
        return ChatChunk(**self.common, choices=[DeltaChoice(delta=Delta(content=text), finish_reason=reason)])

    def end(self, usage: Usage) -> ChatChunk:
        """See `Reply`."""
        return ChatChunk(**self.common, choices=[], usage=usage)


class Account:
    """What an answer's events come to: usage, and metrics of its request and of the server."""

    def __init__(self, request: RequestContext, metrics: Metrics, size: ContextSize) -> None:
        """An answer to a context of this `size` begins."""
        self._request, self._metrics, self._size = request, metrics, size
        request.metrics |= {"tokens": size.tokens, "nuggets": size.nuggets, "whole": size.whole}
        for kind in ("tokens", "nuggets", "whole"):
            metrics.tokens.labels(kind).inc(getattr(size, kind))

    def first_text(self) -> None:
        """The first text is on its way."""
        if "first_token_seconds" not in self._request.metrics:
            seconds = self._request.seconds
            self._request.metrics["first_token_seconds"] = round(seconds, 4)
            self._metrics.first_token.observe(seconds)

    def finish(self, finished: Finished) -> Usage:
        """The answer is complete."""
        self._metrics.tokens.labels("answer").inc(finished.tokens)
        self._request.metrics |= {"answer_tokens": finished.tokens, "finish": finished.reason}
        size = self._size
        return Usage(
            prompt_tokens=size.tokens,
            compressed_prompt_tokens=size.nuggets + size.whole,
            completion_tokens=finished.tokens,
            total_tokens=size.tokens + finished.tokens,
            prompt_tokens_details=PromptDetails(
                cached_tokens=size.stored,
                nuggets=size.nuggets,
                whole_tokens=size.whole,
                unread_tokens=size.unread,
            ),
        )


async def respond(
    events: AsyncIterator[Event], reply: Reply, request: RequestContext, metrics: Metrics, *, stream: bool, usage: bool
) -> Response:
    """The response to one question; it begins when the context begins to be read, so that errors have their status.

    Args:
        events: of the answer.
        reply: its form.
        request: whose response this is.
        metrics: where it is counted.
        stream: send text as it comes.
        usage: end a stream with the usage.
    """
    size = await anext(events)
    if not isinstance(size, ContextSize):
        raise TypeError(f"an answer begins with the size of its context, not with {type(size).__name__}")
    account = Account(request, metrics, size)
    if stream:
        return StreamingResponse(_sent(events, reply, account, usage), media_type="text/event-stream")
    text = ""
    async for event in events:
        if isinstance(event, Text):
            account.first_text()
            text += event.text
        elif isinstance(event, Finished):
            whole = reply.whole(text, event.reason, account.finish(event))
    return JSONResponse(whole.model_dump())


async def _sent(events: AsyncIterator[Event], reply: Reply, account: Account, usage: bool) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    try:
        if (first := reply.first()) is not None:
            yield server_sent(first)
        async for event in events:
            if isinstance(event, Text):
                account.first_text()
                yield server_sent(reply.chunk(event.text, None))
            elif isinstance(event, Finished):
                total = account.finish(event)
                yield server_sent(reply.chunk("", event.reason))
                if usage:
                    yield server_sent(reply.end(total))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already: an event must say it
        answer = api_error(error)
        yield answer.event()
        if answer.status >= 500:
            raise
