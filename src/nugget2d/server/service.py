"""The layer between requests and the engine: tokenizes, loads memories, and passes on the events of jobs."""

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError, UnknownMemoryError
from nugget2d.inference.prompting import PLAIN_STOP, Message, plain_text, stop_tokens
from nugget2d.inference.sampling import Sampler
from nugget2d.memory.memory import Memory
from nugget2d.methods.options import CompressOptions
from nugget2d.model import Nugget2D
from nugget2d.server.compression import consecutive
from nugget2d.server.context import RequestContext
from nugget2d.server.engine import Engine
from nugget2d.server.events import Event, Failed, Finished, Made
from nugget2d.server.fitting import Prompt, fit_around_context, fit_conversation, fit_text
from nugget2d.server.jobs import Compression, Generation, Job
from nugget2d.server.metrics import Metrics
from nugget2d.server.schemas import MemoryRequest
from nugget2d.server.settings import Settings
from nugget2d.store import MemoryStore, Record
from nugget2d.store.record import record_id
from nugget2d.text.detokenizer import Transcript
from nugget2d.text.segmentation import tokenize

THREADS = 4  # texts that are tokenized or files that are read at once

T = TypeVar("T")
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Question:
    """What shall be continued, and how.

    Attributes:
        prompt: a text, or a conversation.
        memory_ids: the memories before it.
        max_tokens: of the answer.
        sampler: how its tokens are chosen.
        stop: where it ends.
    """

    prompt: str | Sequence[Message]
    memory_ids: Sequence[str]
    max_tokens: int
    sampler: Sampler
    stop: Sequence[str]


class Service:
    """One model, one store, one engine."""

    def __init__(self, model: Nugget2D, store: MemoryStore, settings: Settings, metrics: Metrics) -> None:
        """Start the engine; `close` ends it."""
        self.settings, self.metrics, self.store = settings, metrics, store
        # the same weights under the public name, so that errors reveal no folder; and if `max_context` exceeds the
        # context that the model was trained on, it applies to memories too
        changes = {"name": settings.name, "context": max(model.config.context, settings.max_context)}
        self._model = copy.copy(model)
        self._model.config = model.config.model_copy(update=changes)
        self._local = threading.local()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="nugget2d-text")
        self.engine = Engine(
            self._model, max_num_seqs=settings.max_num_seqs, queue=settings.queue, on_step=metrics.batch.observe
        )
        self._ends = stop_tokens(model.lm.generation_config, model.tokenizer)
        metrics.waiting.set_function(lambda: self.engine.num_waiting)
        metrics.running.set_function(lambda: self.engine.num_running)

    def close(self) -> None:
        """Fail what is not done."""
        self.engine.close()
        self._threads.shutdown()

    async def in_thread(self, call: Callable[[], T]) -> T:
        """What `call` returns, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """This thread's own: a tokenizer has settings that change with a call, and two threads would collide."""
        if not hasattr(self._local, "tokenizer"):
            self._local.tokenizer = copy.deepcopy(self._model.tokenizer)
        return self._local.tokenizer

    async def remember(self, context: RequestContext, request: MemoryRequest) -> Record:
        """Keep the memory of a text; it is compressed only if this owner has not added it before.

        (Using that of another owner would reveal, by the time it takes, that the text is stored.)

        Raises:
            InputError: a text without tokens.
            OverloadError, ShutdownError, TimeLimitError: see `Engine`.
            OutputError, StoreError: see `MemoryStore.put`.
        """
        self.engine.require_room()
        given = self._budget(request)
        if doubled := [name for name in request.options if name in given]:
            raise InputError(f"{', '.join(doubled)} in options: these have fields of their own beside it")
        settings = CompressOptions.of(self._model, **given, **request.options)

        def begin() -> tuple[str, Record | None]:
            key = settings.address(request.text, self._model)
            with suppress(UnknownMemoryError):
                return key, self.store.record(record_id(key, context.owner), owner=context.owner)
            return key, None

        key, known = await self.in_thread(begin)
        if known is not None:
            return known
        size = await self.in_thread(lambda: len(tokenize(self.tokenizer, request.text)[0]))
        if not size:
            raise InputError("the text is empty; there is nothing to compress")

        def job(emit: Emit) -> Job:
            return Compression(request.text, size, settings, emit=emit, seconds=self.settings.seconds)

        async for event in self._events(context, job):
            if isinstance(event, Made):
                memory = event.memory
        context.metrics |= {"tokens": memory.num_tokens, "nuggets": memory.num_nuggets}
        return await self.in_thread(
            lambda: self.store.put(
                memory,
                model=self._model,
                key=key,
                name=request.name,
                tags=request.tags,
                owner=context.owner,
                settings=settings,
                text=request.text,
            )
        )

    async def ask(self, context: RequestContext, question: Question) -> AsyncIterator[Event]:
        """An answer as it comes: `ContextSize`, `Text`s, `Finished`.

        Raises:
            InputError: nothing to continue, a text that cannot be tokenized, messages that the chat template refuses
                or that are too long for it, more positions than the model has.
            UnknownMemoryError, MismatchError: a memory that is not there, or not for this model.
            OverloadError, ShutdownError, TimeLimitError: see `Engine`.
        """
        self.engine.require_room()
        prompt, stop, memory = await self.in_thread(lambda: self._read(context.owner, question))

        def job(emit: Emit) -> Job:
            return Generation(
                prompt.ids,
                memory=memory,
                prefix=prompt.prefix,
                prefix_options=self._prefix_options(memory) if prompt.prefix else None,
                max_new_tokens=question.max_tokens,
                ends=self._ends,
                sampler=question.sampler,
                transcript=Transcript(self._model.tokenizer, [*question.stop, *stop]),
                emit=emit,
                seconds=self.settings.seconds,
            )

        async for event in self._events(context, job):
            yield event

    def _read(self, owner: str, question: Question) -> tuple[Prompt, Sequence[str], Memory | None]:
        """What the model will read, the strings that end its answer, and the memory before it."""
        if not question.memory_ids and not question.prompt:
            raise InputError("nothing to continue: give a prompt or memory_ids")
        memories = [self.store.get(memory_id, owner=owner) for memory_id in question.memory_ids]
        memory = consecutive(self._model, memories) if memories else None
        tokenizer, limit, window = self.tokenizer, self._limit(question), self._model.config.window
        text, stop = question.prompt, list[str]()
        if not isinstance(text, str):
            if memory is not None and memory.method.config.get("chat"):
                return fit_around_context(tokenizer, text, limit, memory.kv.prefix_ids), stop, memory
            if tokenizer.chat_template:
                return fit_conversation(tokenizer, text, limit, window), stop, memory
            text, stop = plain_text(text), [PLAIN_STOP]
        prompt = fit_text(tokenizer, text, limit, window, after=memory is not None)
        if memory is None and not prompt.prefix:  # plain language modelling
            start = [] if self._model.start_token is None else [self._model.start_token]
            prompt = Prompt("", prompt.ids if prompt.ids[:1] == start else [*start, *prompt.ids])
        return prompt, stop, memory

    def _budget(self, request: MemoryRequest) -> dict[str, Any]:
        """Method and budget of a request; without a budget the server's ratio."""
        given = {"ratio": request.ratio, "nuggets": request.nuggets, "nbytes": request.nbytes}
        if not any(given.values()):
            given["ratio"] = self.settings.ratio
        return {"method": request.method, "dtype": request.dtype, **given}

    def _prefix_options(self, memory: Memory | None) -> CompressOptions:
        """How the beginning of a long prompt is compressed: so that it can be read behind the memory."""
        method = None if memory is None else memory.method.name
        return CompressOptions.of(self._model, method=method, ratio=self.settings.ratio)

    def _limit(self, question: Question) -> int:
        """How many tokens of the prompt are read uncompressed."""
        model, limit = self._model, self.settings.max_context
        if model.max_positions is None:
            return limit
        limit = min(limit, model.max_positions - question.max_tokens - 1)
        if limit < model.config.window // 2:
            raise InputError(f"max_tokens leaves no room for a prompt: the model has {model.max_positions} positions")
        return limit

    async def _events(self, context: RequestContext, make: Callable[[Emit], Job]) -> AsyncIterator[Event]:
        """Run a job; it is cancelled when the request is over."""
        loop = asyncio.get_running_loop()
        # unbounded: an answer has max_tokens events at most, and the engine must never wait for a reader
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed, and the events are not read
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = make(emit)
        context.ending.callback(job.cancel)
        self.engine.submit(job)
        while True:
            event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, (Finished, Made)):
                return
