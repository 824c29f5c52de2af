"""Schemas of requests and responses: the supported fields of the OpenAI API, and `memory_ids`.

Fields that would change the answer and are not supported are refused, unless they have their neutral value.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nugget2d.config import Frozen
from nugget2d.memory.states import StoreDtype


def _utf8(text: str) -> str:
    """JSON can hold what no file, database or response can: half of a surrogate pair."""
    text.encode()  # UnicodeEncodeError is a ValueError
    return text


Word = Annotated[str, AfterValidator(_utf8)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]
Tag = Annotated[Word, Field(max_length=100)]
Zero = Literal[0] | None


class StreamOptions(Frozen):
    """What a stream brings besides text."""

    include_usage: bool = False


class Generating(Frozen):
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

    model_config = ConfigDict(allow_inf_nan=False)

    model: Word
    memory_ids: list[Word] = Field(default=[], max_length=64)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Generating):
    """`POST /v1/completions`: continue `prompt`, which may be empty where there are memories."""

    prompt: str = ""
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class ContentPart(Frozen):
    """A part of a message; only text."""

    type: Literal["text"]
    text: str


class ChatMessage(Frozen):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generating):
    """`POST /v1/chat/completions`: answer a conversation."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None


class MemoryRequest(Frozen):
    """`POST /v1/memories`: compress `text`.

    Attributes:
        text: what to compress.
        name: what a person calls it.
        tags: words to filter by.
        method: how, as `nugget2d methods` lists them; None takes the model's default.
        ratio: tokens for each nugget; without any budget the server's own.
        nuggets: how many, in place of a ratio.
        nbytes: bytes of the memory, in place of a ratio.
        dtype: how states are kept.
        options: other options of the method.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    text: str = Field(min_length=1)
    name: Word = Field(default="", max_length=200)
    tags: list[Tag] = Field(default=[], max_length=32)
    method: Word | None = Field(default=None, max_length=100)
    ratio: float | None = Field(default=None, ge=1, le=1e6)
    nuggets: int | None = Field(default=None, ge=1)
    nbytes: int | None = Field(default=None, ge=1)
    dtype: StoreDtype | None = None
    options: dict[Word, Any] = Field(default={}, max_length=32)


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
    """`GET /v1/memories`."""

    object: Literal["list"] = "list"
    data: list[StoredMemory]


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
    """More of the assistant's turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None


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
