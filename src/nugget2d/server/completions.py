"""The routes `/v1/completions` and `/v1/chat/completions`."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from nugget2d.inference.prompting import Message
from nugget2d.inference.sampling import Sampler
from nugget2d.server.api_errors import APIError, documented
from nugget2d.server.bodies import BoundedRoute
from nugget2d.server.context import RequestContext
from nugget2d.server.replies import ChatReply, CompletionReply, Reply, respond
from nugget2d.server.schemas import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Generating,
    message_text,
)
from nugget2d.server.service import Question, Service

DEFAULT_TOKENS = 256
ERRORS = documented(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504)


def completions(service: Service) -> APIRouter:
    """The routes that write."""
    api = APIRouter(route_class=BoundedRoute)
    name = service.settings.name

    @api.post("/v1/completions", response_model=Completion, responses=ERRORS)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, after memories if there are any."""
        return await answer(body, request, body.text, body.max_tokens, CompletionReply(name))

    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, after memories if there are any; what is too long of it is compressed."""
        roles = {"developer": "system"}  # its new name there; templates know the old one
        messages = [Message(roles.get(message.role, message.role), message_text(message)) for message in body.messages]
        return await answer(body, request, messages, body.max_completion_tokens or body.max_tokens, ChatReply(name))

    async def answer(
        body: Generating, request: Request, prompt: str | list[Message], most: int | None, reply: Reply
    ) -> Response:
        require_model(service, body.model)
        limit = service.settings.max_tokens
        if most is not None and most > limit:
            raise APIError(400, f"max_tokens is {most}, this server allows {limit}", param="max_tokens")
        sampler = Sampler(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
        )
        question = Question(prompt, body.memory_ids, most or min(DEFAULT_TOKENS, limit), sampler, body.stops)
        context = RequestContext.of(request)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        events = service.ask(context, question)
        return await respond(events, reply, context, service.metrics, stream=bool(body.stream), usage=usage)

    return api


def require_model(service: Service, name: str) -> None:
    """Refuse any model but the one that is served."""
    if name != service.settings.name:
        raise APIError(
            404, f"there is no model {name!r} here, only {service.settings.name!r}", "model_not_found", "model"
        )
