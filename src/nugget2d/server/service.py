"""What stands between requests and the engine: tokenizing, loading memories, and a job's events as they come."""

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError, UnknownMemoryError
from nugget2d.inference.prompting import Part, Prompt, fit
from nugget2d.inference.sampling import Sampler
from nugget2d.memory.memory import Memory
from nugget2d.model import Nugget2D
from nugget2d.server.engine import Engine
from nugget2d.server.exchange import Exchange
from nugget2d.server.jobs import Compression, Event, Failed, Finished, Generation, Job, Made, consecutive
from nugget2d.server.metrics import Metrics
from nugget2d.server.schemas import MemoryRequest
from nugget2d.server.settings import Settings
from nugget2d.store import MemoryStore, Record
from nugget2d.store import Settings as Compressing
from nugget2d.store.record import record_id
from nugget2d.text.detokenizer import Transcript
from nugget2d.text.segmentation import split

THREADS = 4  # texts that are tokenized or files that are read at once

T = TypeVar("T")
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Question:
    """What shall be continued, and how.

    Attributes:
        parts: the prompt.
        memory_ids: what stands before it.
        max_tokens: of the answer.
        sampler: how its tokens are chosen.
        stop: where it ends.
    """

    parts: Sequence[Part]
    memory_ids: Sequence[str]
    max_tokens: int
    sampler: Sampler
    stop: Sequence[str]


class Service:
    """One model, one store, one engine."""

    def __init__(self, model: Nugget2D, store: MemoryStore, settings: Settings, metrics: Metrics) -> None:
        """Start the engine; `close` ends it."""
        self.settings, self.metrics, self.store = settings, metrics, store
        self._fingerprint = model.fingerprint  # by its own name, which leads memories back to it
        # the same weights under the name that clients know, so that errors tell no folder; and if whole tokens shall
        # reach further than the model was trained for, memories do so too
        changes = {"name": settings.name, "context": max(model.config.context, settings.max_context)}
        self._model = copy.copy(model)
        self._model.config = model.config.model_copy(update=changes)
        self._local = threading.local()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="nugget2d-text")
        self.engine = Engine(self._model, slots=settings.slots, queue=settings.queue, on_step=metrics.batch.observe)
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

    async def remember(self, exchange: Exchange, request: MemoryRequest) -> Record:
        """Keep the memory of a text; it is compressed only if this owner has not added it before.

        (Taking another owner's would tell, by the time it takes, that somebody has this text.)

        Raises:
            InputError: a text without tokens.
            OverloadError, ShutdownError, TimeLimitError: see `Engine`.
            OutputError, StoreError: see `MemoryStore.put`.
        """
        self.engine.require_room()
        ratio = request.ratio or self.settings.ratio
        settings = Compressing.of(self._model, ratio=ratio, dtype=request.dtype)

        def begin() -> tuple[str, Record | None]:
            key = settings.address(request.text, self._fingerprint)
            with suppress(UnknownMemoryError):
                return key, self.store.record(record_id(key, exchange.owner), owner=exchange.owner)
            return key, None

        key, known = await self.in_thread(begin)
        if known is not None:
            return known
        pieces = await self.in_thread(lambda: split(self.tokenizer, request.text, self._model.config.window))
        if not pieces:
            raise InputError("the text is empty; there is nothing to compress")

        def job(emit: Emit) -> Job:
            return Compression(pieces, ratio, request.dtype, emit=emit, seconds=self.settings.seconds)

        async for event in self._events(exchange, job):
            if isinstance(event, Made):
                memory = event.memory
        exchange.figures |= {"tokens": memory.num_tokens, "nuggets": memory.num_nuggets}
        return await self.in_thread(
            lambda: self.store.put(
                memory,
                model=self._model,
                key=key,
                name=request.name,
                tags=request.tags,
                owner=exchange.owner,
                settings=settings,
            )
        )

    async def ask(self, exchange: Exchange, question: Question) -> AsyncIterator[Event]:
        """An answer as it comes: `Context`, `Text`s, `Finished`.

        Raises:
            InputError: nothing to continue, a text that cannot be tokenized, more positions than the model has.
            UnknownMemoryError, MismatchError: a memory that is not there, or not for this model.
            OverloadError, ShutdownError, TimeLimitError: see `Engine`.
        """
        self.engine.require_room()
        prompt, memory = await self.in_thread(lambda: self._read(exchange.owner, question))

        def job(emit: Emit) -> Job:
            return Generation(
                prompt.ids,
                memory=memory,
                head=prompt.head,
                head_ratio=self.settings.ratio,
                max_new_tokens=question.max_tokens,
                sampler=question.sampler,
                transcript=Transcript(self._model.tokenizer, question.stop),
                emit=emit,
                seconds=self.settings.seconds,
            )

        async for event in self._events(exchange, job):
            yield event

    def _read(self, owner: str, question: Question) -> tuple[Prompt, Memory | None]:
        """What the model will read."""
        if not question.memory_ids and not any(part.text for part in question.parts):
            raise InputError("nothing to continue: give a prompt or memory_ids")
        model, limit = self._model, self.settings.max_context
        if model.reach is not None:
            limit = min(limit, model.reach - question.max_tokens - 1)
            if limit < model.config.window // 2:
                raise InputError(f"max_tokens leaves no room for a prompt: the model has {model.reach} positions")
        memories = [self.store.get(memory_id, owner=owner) for memory_id in question.memory_ids]
        memory = consecutive(model, memories) if memories else None
        prompt = fit(self.tokenizer, question.parts, limit, model.config.window, after=memory is not None)
        if memory is None and not prompt.head:  # plain language modelling
            start = [] if model.start_token is None else [model.start_token]
            return Prompt((), prompt.ids if prompt.ids[:1] == start else [*start, *prompt.ids]), None
        return prompt, memory

    async def _events(self, exchange: Exchange, make: Callable[[Emit], Job]) -> AsyncIterator[Event]:
        """Run a job; it is cancelled when the exchange is over."""
        loop = asyncio.get_running_loop()
        # without bounds: an answer has max_tokens pieces at most, and the engine must never wait for its reader
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = make(emit)
        exchange.ending.callback(job.cancel)
        self.engine.submit(job)
        while True:
            event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, (Finished, Made)):
                return
