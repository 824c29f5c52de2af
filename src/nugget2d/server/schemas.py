"""Schemas of requests and responses: the supported fields of the OpenAI API, and `memory_ids`.

Fields that would change the answer and are not supported are refused, unless they have their neutral value.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from nugget2d.config import Frozen
from nugget2d.memory.states import StoreDtype

T = TypeVar("T")


def _neutral(value: object, accept: ValidatorFunctionWrapHandler) -> object:
    try:
        return accept(value)
    except ValidationError as error:
        raise PydanticCustomError("unsupported", "not supported here with this value; leave it out") from error


def _one(prompt: object) -> object:
    """What OpenAI's batch of prompts would be is refused in plain words."""
    if isinstance(prompt, list) and not (len(prompt) == 1 and isinstance(prompt[0], str)):
        raise PydanticCustomError("one_prompt", "one text in a request; send a string, or a list of one string")
    return prompt


StopString = Annotated[str, Field(min_length=1, max_length=200)]
Tag = Annotated[str, Field(max_length=100)]
Name = Annotated[str, Field(max_length=200)]
MethodName = Annotated[str, Field(max_length=100)]
Options = Annotated[dict[str, Any], Field(max_length=32)]
# a list that stops at the first wrong item: errors for all of them would take longer than anything else
Few = Annotated[list[T], Field(fail_fast=True)]
Neutral = Annotated[T | None, WrapValidator(_neutral)]
NoList = Neutral[Annotated[list[Any], Field(max_length=0)]]
NoDict = Neutral[Annotated[dict[str, Any], Field(max_length=0)]]


class Sent(Frozen):
    """What a client sends."""

    @model_validator(mode="before")
    @classmethod
    def _few(cls, fields: Any) -> Any:
        """Of unknown fields the first is kept, for its error: errors for thousands would take long."""
        if not isinstance(fields, dict):
            return fields
        known = {name: value for name, value in fields.items() if name in cls.model_fields}
        unknown = next((name for name in fields if name not in known), None)
        return known if unknown is None else known | {unknown: fields[unknown]}


class StreamOptions(Sent):
    """What a stream brings besides text."""

    include_usage: bool | None = None
    include_obfuscation: Neutral[Literal[False]] = None


class Generating(Sent):
    """What completions and chat have in common.

    Attributes:
        model: the served model's name (`/v1/models`).
        memory_ids: memories to read before the prompt, in this order.
        max_tokens: of the answer; 256 unless the server allows less.
        temperature: 0 takes the likeliest token every time.
        top_p: draws from the likeliest tokens of this probability only.
        seed: the same seed gives the same answer.
        stop: the answer ends before any of these.
        stream: send it as it is written.
        stream_options: see there.
        user: ignored.
    """

    model: str
    memory_ids: Few[str] = Field(default=[], max_length=64)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Neutral[Literal[1]] = None
    presence_penalty: Neutral[Literal[0]] = None
    frequency_penalty: Neutral[Literal[0]] = None
    logit_bias: NoDict = None

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Generating):
    """`POST /v1/completions`: continue `prompt`, which may be empty where there are memories."""

    prompt: Annotated[str | Annotated[list[str], Field(min_length=1, max_length=1)] | None, BeforeValidator(_one)] = (
        None
    )
    best_of: Neutral[Literal[1]] = None
    echo: Neutral[Literal[False]] = None
    logprobs: Neutral[None] = None
    suffix: Neutral[Literal[""]] = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt[0] if isinstance(self.prompt, list) else self.prompt or ""


class ContentPart(Sent):
    """A part of a message; only text."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class ChatMessage(Sent):
    """One turn; `name` is ignored."""

    role: Literal["system", "developer", "user"]
    content: str | Few[ContentPart]
    name: str | None = None


class AssistantMessage(Sent):
    """A turn of the model's own, with the fields that an earlier answer had; without content it is empty."""

    role: Literal["assistant"]
    content: str | Few[ContentPart] | None = None
    name: str | None = None
    refusal: Neutral[Literal[""]] = None
    annotations: NoList = None
    audio: Neutral[None] = None
    function_call: Neutral[None] = None
    tool_calls: NoList = None


def message_text(message: ChatMessage | AssistantMessage) -> str:
    """All text of a message."""
    content = message.content or ""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class TextFormat(Sent):
    """The answer as it comes."""

    type: Literal["text"]


class ChatRequest(Generating):
    """`POST /v1/chat/completions`: answer a conversation.

    Attributes:
        messages: its turns.
        max_completion_tokens: the new name of `max_tokens`.
        metadata: ignored, as `safety_identifier` and all that begins with `prompt_cache`: they change no answer.
    """

    messages: Few[Annotated[ChatMessage | AssistantMessage, Field(discriminator="role")]] = Field(
        min_length=1, max_length=4096
    )
    max_completion_tokens: int | None = Field(default=None, ge=1)
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    audio: Neutral[None] = None
    function_call: Neutral[Literal["none", "auto"]] = None
    functions: NoList = None
    logprobs: Neutral[Literal[False]] = None
    modalities: Neutral[Annotated[list[Literal["text"]], Field(max_length=1)]] = None
    moderation: Neutral[None] = None
    parallel_tool_calls: bool | None = None
    prediction: Neutral[None] = None
    reasoning_effort: Neutral[Literal["none"]] = None
    response_format: Neutral[TextFormat] = None
    service_tier: Neutral[Literal["auto", "default"]] = None
    store: Neutral[Literal[False]] = None
    tool_choice: Neutral[Literal["none", "auto"]] = None
    tools: NoList = None
    top_logprobs: Neutral[Literal[0]] = None
    verbosity: Neutral[Literal["medium"]] = None
    web_search_options: Neutral[None] = None


class MemoryRequest(Sent):
    """`POST /v1/memories`: compress `text`.

    Attributes:
        text: what to compress.
        name: what a person calls it.
        tags: words to filter by.
        method: how, as `nugget2d methods` lists them; None takes the model's default.
        ratio: tokens for each nugget; without any budget the server's own.
        nuggets: how many, in place of a ratio.
        nbytes: bytes of the memory, in place of a ratio.
        dtype: how states are kept; None takes int8.
        options: other options of the method.
    """

    text: str = Field(min_length=1)
    name: Name = ""
    tags: Few[Tag] = Field(default=[], max_length=32)
    method: MethodName | None = None
    ratio: float | None = Field(default=None, ge=1, le=1e6)
    nuggets: int | None = Field(default=None, ge=1)
    nbytes: int | None = Field(default=None, ge=1)
    dtype: StoreDtype | None = None
    options: Options = Field(default={})


class MemoryQuery(Sent):
    """`GET /v1/memories`: which part of the list; the next one begins `after` its `last_id`.

    Attributes:
        limit: how many.
        after: the id of the memory before the first one.
        order: by age: "asc" is oldest first.
        tag: only memories that have it.
    """

    limit: int = Field(default=100, ge=1, le=100)
    after: str | None = None
    order: Literal["asc", "desc"] = "asc"
    tag: str | None = None


# ---- what they get ----


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nugget2d"


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class StoredMemory(BaseModel):
    """A memory as its owner sees it."""

    id: str
    object: Literal["memory"] = "memory"
    created_at: int
    name: str
    tags: list[str]
    num_tokens: int
    num_nuggets: int
    num_chars: int
    ratio: float
    bytes: int


class MemoryList(BaseModel):
    """`GET /v1/memories`: a part of the list, its first and last id, and whether there is more after it."""

    object: Literal["list"] = "list"
    data: list[StoredMemory]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedMemory(BaseModel):
    """`DELETE /v1/memories/{id}`."""

    id: str
    object: Literal["memory"] = "memory"
    deleted: Literal[True] = True


class PromptDetails(BaseModel):
    """Where the tokens of a context went.

    `cached_tokens` of them were in stored memories; `nuggets` and `whole_tokens` are what the model read; the first
    `unread_tokens` were not read, as the model has no positions for them.
    """

    cached_tokens: int
    nuggets: int
    whole_tokens: int
    unread_tokens: int


class Usage(BaseModel):
    """`prompt_tokens`: the context as given, memories included; `compressed_prompt_tokens`: what was read for it."""

    prompt_tokens: int
    compressed_prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionChoice(BaseModel):
    """The text that continues a prompt."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The answer of `/v1/completions`, or a chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Answer(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int = 0
    message: Answer
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """More of the assistant's turn; `role` in the first one only."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=lambda role: role is None)
    content: str


class DeltaChoice(BaseModel):
    """More of one answer."""

    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """A chunk of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Usage | None = None
