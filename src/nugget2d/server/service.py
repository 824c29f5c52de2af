"""The layer between requests and the engine: tokenizes, loads memories, and passes on the events of jobs."""

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from nugget2d.errors import InputError
from nugget2d.inference.prompting import PLAIN_STOP, Message, plain_text, stop_tokens
from nugget2d.inference.sampling import Sampler
from nugget2d.memory.memory import Memory
from nugget2d.methods.options import CompressOptions
from nugget2d.model import Nugget2D
from nugget2d.server.compression import consecutive
from nugget2d.server.context import RequestContext
from nugget2d.server.costs import PIECE, ROW, TOKENIZED, Costs, count_tokens
from nugget2d.server.engine import Engine
from nugget2d.server.events import Event, Failed, Finished, Made
from nugget2d.server.fitting import Prompt, fit_around_context, fit_conversation, fit_text
from nugget2d.server.jobs import Compression, Generation, Job, too_late
from nugget2d.server.limits import Quota, Room
from nugget2d.server.loading import Loader
from nugget2d.server.metrics import Metrics
from nugget2d.server.schemas import MemoryRequest
from nugget2d.server.settings import Settings
from nugget2d.store import MemoryStore, Record
from nugget2d.text.detokenizer import Transcript

THREADS = 2  # of each kind of work

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

    @property
    def texts(self) -> list[str]:
        """What the prompt is made of."""
        return [self.prompt] if isinstance(self.prompt, str) else [message.text for message in self.prompt]


@dataclass(frozen=True, eq=False)
class _Reading:
    """What the model reads for a question: the memory, and a prompt after it.

    Attributes:
        prompt: see there.
        stop: strings that end the answer, besides the question's own.
        memory: what is read before it.
        unread: tokens of other memories before that one.
        entries: of a cache for all that and the answer.
    """

    prompt: Prompt
    stop: Sequence[str]
    memory: Memory | None
    unread: int
    entries: int


class Service:
    """One model, one store, one engine."""

    def __init__(
        self,
        model: Nugget2D,
        store: MemoryStore,
        settings: Settings,
        metrics: Metrics,
        *,
        several_keys: bool = False,
    ) -> None:
        """Start the engine; `close` ends it."""
        self.settings, self.metrics, self.store = settings, metrics, store
        # the same weights under the public name, so that errors reveal no folder; and if `max_context` exceeds the
        # context that the model was trained on, it applies to memories too
        changes = {"name": settings.name, "context": max(model.config.context, settings.max_context)}
        self._model = copy.copy(model)
        self._model.config = model.config.model_copy(update=changes)
        self._local = threading.local()
        # lists and records wait for no text or file, and short texts for no long one
        self._light, self._short, self._long = (
            ThreadPoolExecutor(THREADS, thread_name_prefix=f"nugget2d-{kind}") for kind in ("light", "short", "long")
        )
        self._loader, self._quota = Loader(store), Quota(settings.max_stored)
        self.room = Room(settings.max_memory // 2)
        self._costs = Costs.of(self._model)  # before the engine has the model
        self.engine = Engine(
            self._model,
            max_num_seqs=settings.max_num_seqs,
            queue=settings.queue,
            several_keys=several_keys,
            max_entries=settings.max_memory // 2 // self._costs.token,
            on_step=metrics.batch.observe,
        )
        self._ends = stop_tokens(model.lm.generation_config, model.tokenizer)
        metrics.waiting.set_function(lambda: self.engine.num_waiting)
        metrics.running.set_function(lambda: self.engine.num_running)

    def close(self) -> None:
        """Fail what is not done."""
        self.engine.close()
        for threads in (self._light, self._short, self._long):
            threads.shutdown()

    async def in_thread(self, context: RequestContext, call: Callable[[], T]) -> T:
        """What `call` returns, without holding up the event loop, for what is over soon.

        Raises:
            TimeLimitError: the request has no time left.
        """
        return await self._run(self._light, context, call)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """This thread's own: a tokenizer has settings that change with a call, and two threads would collide."""
        if not hasattr(self._local, "tokenizer"):
            self._local.tokenizer = copy.deepcopy(self._model.tokenizer)
        return self._local.tokenizer

    async def remember(self, context: RequestContext, request: MemoryRequest) -> Record:
        """Keep the memory of a text; it is compressed only if this owner does not have it, whole.

        (Using that of another owner would reveal, by the time it takes, that the text is stored.)

        Raises:
            InputError: a text without tokens.
            LimitError: a text or a memory that is too large, alone or with what its owner keeps already.
            OverloadError, ShutdownError, TimeLimitError: see `Engine`; too little memory is left by others.
            OutputError, StoreError: see `MemoryStore.put`.
        """
        leave = self._enter(context)
        given = request.model_dump(include={"method", "dtype", "ratio", "nuggets", "nbytes"})
        if doubled := [name for name in request.options if name in given]:
            raise InputError(f"{', '.join(doubled)} in options: these have fields of their own beside it")
        settings = CompressOptions.to_keep(self._model, **given, **request.options)
        # the server's ratio in place of the method's, unless the options determine how much is kept
        if settings.ratio is not None and request.ratio is None:
            settings = settings.model_copy(update={"ratio": self.settings.ratio})

        def begin() -> tuple[str, Record | None, int]:
            key = settings.address(request.text, self._model)
            known = self.store.at(key, owner=context.owner)
            return key, known, 0 if known is not None else self._begin(context, request.text, settings)

        chars = len(request.text)
        key, known, size = await self._work(context, chars, begin)
        if known is not None:
            return known

        def job(emit: Emit) -> Job:
            return Compression(request.text, size, settings, emit=emit, seconds=context.left, owner=context.owner)

        async for event in self._events(context, job, leave):
            if isinstance(event, Made):
                memory = event.memory
        context.metrics |= {"tokens": memory.num_tokens, "nuggets": memory.num_nuggets}
        return await self._work(
            context,
            chars,
            lambda: self.store.put(
                memory,
                model=self._model,
                key=key,
                name=request.name,
                tags=request.tags,
                owner=context.owner,
                settings=settings,
                text=request.text,
            ),
        )

    async def ask(self, context: RequestContext, question: Question) -> AsyncIterator[Event]:
        """An answer as it comes: `ContextSize`, `Text`s, `Finished`.

        Raises:
            InputError: nothing to continue, a text that cannot be tokenized, messages that the chat template refuses
                or that are too long for it, more positions than the model has.
            UnknownMemoryError, MismatchError: a memory that is not there, or not for this model.
            LimitError: texts or memories that are too large.
            OverloadError, ShutdownError, TimeLimitError: see `Engine`; too little memory is left by others.
        """
        leave = self._enter(context)
        async for event in self._events(context, await self._question(context, question), leave):
            yield event

    async def _question(self, context: RequestContext, question: Question) -> Callable[[Emit], Job]:
        """What makes the job of a question; nothing else holds its memory."""
        reading = await self._work(context, sum(map(len, question.texts)), lambda: self._read(context, question))
        prompt, stop = reading.prompt, reading.stop

        def job(emit: Emit) -> Job:
            return Generation(
                prompt.ids,
                memory=reading.memory,
                unread=reading.unread,
                prefix=prompt.prefix,
                prefix_options=self._prefix_options(reading.memory) if prompt.prefix else None,
                max_new_tokens=question.max_tokens,
                ends=self._ends,
                sampler=question.sampler,
                transcript=Transcript(self._model.tokenizer, [*question.stop, *stop]),
                emit=emit,
                seconds=context.left,
                owner=context.owner,
                entries=reading.entries,
            )

        return job

    def _enter(self, context: RequestContext) -> Callable[[], None]:
        """A place for a request; what is returned gives it back before its end."""
        leave = self.engine.enter(context.owner)
        context.at_end(leave)
        return leave

    async def _work(self, context: RequestContext, chars: int, call: Callable[[], T]) -> T:
        """The same for what is made of so many characters."""
        return await self._run(self._short if chars <= PIECE else self._long, context, call)

    async def _run(self, threads: ThreadPoolExecutor, context: RequestContext, call: Callable[[], T]) -> T:
        """What `call` returns in one of these threads; not begun if the request is over by then."""

        def work() -> T:
            self._require_time(context)
            return call()

        try:
            working = asyncio.get_running_loop().run_in_executor(threads, work)
            return await asyncio.wait_for(working, max(context.left, 0))
        except asyncio.TimeoutError as error:
            raise too_late() from error

    def _require_time(self, context: RequestContext) -> None:
        if context.over or context.left <= 0:
            raise too_late()

    def _count(self, context: RequestContext, texts: Sequence[str]) -> int:
        """About how many tokens texts have; the request holds what they take."""
        tokens = count_tokens(self.tokenizer, texts, self.settings.max_input, lambda: self._require_time(context))
        context.held.take(TOKENIZED * tokens)
        return tokens

    def _begin(self, context: RequestContext, text: str, settings: CompressOptions) -> int:
        """The tokens of a text that will be compressed; the request holds what it will take."""
        tokens = self._count(context, [text])
        if not tokens:
            raise InputError("the text is empty; there is nothing to compress")
        made = self._costs.memory(self._model, settings, tokens)
        context.held.take(self._costs.compression(made, tokens))
        owner = context.owner
        context.at_end(self._quota.take(owner, made, lambda: self.store.nbytes(owner=owner)))
        return tokens

    def _load(self, context: RequestContext, ids: Sequence[str]) -> tuple[Memory | None, int]:
        """The memories of these ids as one, and the tokens of those at the beginning that are out of the model's reach.

        The request holds what they take.
        """
        records = [self.store.record(memory_id, owner=context.owner) for memory_id in ids]
        tokens = [record.num_tokens for record in records]
        first = len(records)
        while first and sum(tokens[first:]) < self._costs.context:
            first -= 1
        records, unread = records[first:], sum(tokens[:first])
        nbytes = sum({record.key: record.nbytes for record in records}.values())
        if len(records) > 1:  # they are copied, perhaps in another dtype
            nbytes += sum(max(record.nbytes, record.num_nuggets * self._costs.token) for record in records)
        context.held.take(nbytes)
        context.memories = [self._loader.get(record) for record in records]
        return consecutive(self._model, context.memories) if records else None, unread

    def _read(self, context: RequestContext, question: Question) -> _Reading:
        """What the model will read for a question."""
        if not question.memory_ids and not question.prompt:
            raise InputError("nothing to continue: give a prompt or memory_ids")
        tokens = self._count(context, question.texts)
        memory, unread = self._load(context, question.memory_ids)
        prompt, stop = self._fit(question, memory)
        nuggets, compressed = 0 if memory is None else memory.num_nuggets, max(0, tokens - len(prompt.ids))
        if prompt.prefix:
            kept = ceil(compressed / self.settings.ratio)
            context.held.take(self._costs.compression(kept * self._costs.token, compressed))
            nuggets += kept
        entries = self._costs.entries(nuggets, len(prompt.ids) + question.max_tokens)
        context.held.take(ROW * entries * self._costs.token)
        return _Reading(prompt, stop, memory, unread, entries)

    def _fit(self, question: Question, memory: Memory | None) -> tuple[Prompt, Sequence[str]]:
        """A prompt as the model reads it after a memory, and the strings that end its answer."""
        tokenizer, limit, window = self.tokenizer, self._limit(question), self._model.config.window
        text, stop = question.prompt, list[str]()
        if not isinstance(text, str):
            if memory is not None and memory.method.config.get("chat"):
                return fit_around_context(tokenizer, text, limit, memory.kv.prefix_ids), stop
            if tokenizer.chat_template:
                return fit_conversation(tokenizer, text, limit, window), stop
            text, stop = plain_text(text), [PLAIN_STOP]
        prompt = fit_text(tokenizer, text, limit, window, after=memory is not None)
        if memory is None and not prompt.prefix:  # plain language modelling
            start = [] if self._model.start_token is None else [self._model.start_token]
            prompt = Prompt("", prompt.ids if prompt.ids[:1] == start else [*start, *prompt.ids])
        return prompt, stop

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

    async def _events(
        self, context: RequestContext, make: Callable[[Emit], Job], leave: Callable[[], None]
    ) -> AsyncIterator[Event]:
        """Run a job, and `leave` its place; it is cancelled when the request is over."""
        loop = asyncio.get_running_loop()
        # unbounded: an answer has max_tokens events at most, and the engine must never wait for a reader
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed, and the events are not read
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = make(emit)
        del make  # and the memory with it
        context.at_end(job.cancel)
        # the engine may be in the middle of a long step
        late = loop.call_later(context.left, events.put_nowait, Failed(too_late()))
        context.at_end(late.cancel)
        self.engine.submit(job)
        while True:
            event = await events.get()
            if isinstance(event, (Failed, Finished, Made)):
                leave()  # before the client knows
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, (Finished, Made)):
                return
