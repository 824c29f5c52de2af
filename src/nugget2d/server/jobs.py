"""Jobs of the engine, each for one client: making a memory, or generating an answer.

The `work` of a job is a generator that pauses after every step, so that the engine can continue other jobs in between,
and drop cancelled ones. Events for the client go through `emit`, which never blocks.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from nugget2d.errors import TimeLimitError
from nugget2d.inference.prefix import prefix
from nugget2d.inference.sampling import Sampler
from nugget2d.memory.memory import Memory
from nugget2d.methods.options import CompressOptions
from nugget2d.modeling.headwise import HeadwiseCache
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.server.batch_cache import BatchCache, RowCache, read, row_cache
from nugget2d.server.compression import consecutive
from nugget2d.server.events import ContextSize, Event, Finished, Made, Text
from nugget2d.text.detokenizer import Transcript

# Tokens of a prompt read at a time: running answers wait for so many, and long prompts lose little by the cuts.
TURN = 256
CHARS_PER_TOKEN = 4  # about, for whose turn it is

# yields how many tokens are left to read, after every step
Work = Generator[int, None, None]


def too_late() -> TimeLimitError:
    """Why a request fails that exceeded its time limit."""
    return TimeLimitError("the request took longer than the server allows; ask for less")


class Job(ABC):
    """One request to an engine.

    Attributes:
        emit: takes every event, in the engine's thread; it must neither wait nor raise.
        deadline: when `time.monotonic` will have passed this, the job fails.
        size: tokens that it will read.
        owner: whose it is.
        entries: of the cache that its answer needs.
        cancelled: see `cancel`.
    """

    def __init__(
        self, emit: Callable[[Event], None], seconds: float, size: int, owner: str = "", entries: int = 0
    ) -> None:
        """A job of `size` tokens that fails if it takes more than `seconds` from now on."""
        self.emit, self.size, self.owner, self.entries = emit, size, owner, entries
        self.deadline = time.monotonic() + seconds
        self.cancelled = False

    def cancel(self) -> None:
        """Let the engine drop it before its next step. From any thread."""
        self.cancelled = True

    @abstractmethod
    def work(self, model: Network) -> Work:
        """All that is done for this job alone."""


class Compression(Job):
    """A text becomes a memory, `Made` at the end."""

    def __init__(
        self,
        text: str,
        size: int,
        options: CompressOptions,
        *,
        emit: Callable[[Event], None],
        seconds: float,
        owner: str = "",
    ) -> None:
        """`text`, of `size` tokens, compressed as `options` say."""
        super().__init__(emit, seconds, size, owner)
        self._text, self._options = text, options

    def work(self, model: Network) -> Work:
        """Compress step by step, if the method can pause."""
        memory = yield from compress(model, self._text, self._options)
        self.emit(Made(memory))


class Generation(Job):
    """A prompt, perhaps after memories, is continued: `ContextSize`, then `Text` as it comes, then `Finished`.

    Attributes:
        role: after `work`: with which weights it is read.
        cache: after `work`: a single row, all that was read.
        position: of the next input.
        token: the next input, the last token of the answer so far.
        max_new_tokens: the answer's length at most.
        done: the answer is complete.
    """

    def __init__(
        self,
        ids: Sequence[int],
        *,
        memory: Memory | None = None,
        unread: int = 0,
        prefix: str = "",
        prefix_options: CompressOptions | None = None,
        max_new_tokens: int,
        ends: frozenset[int],
        sampler: Sampler,
        transcript: Transcript,
        emit: Callable[[Event], None],
        seconds: float,
        owner: str = "",
        entries: int = 0,
    ) -> None:
        """Continue [memory | prefix, compressed | ids].

        Args:
            ids: tokens to be read uncompressed.
            memory: what was stored.
            unread: tokens of stored memories before it, which are out of reach.
            prefix: the text between them, to be compressed.
            prefix_options: how.
            max_new_tokens: at most so many.
            ends: tokens that end the answer.
            sampler: how tokens are chosen.
            transcript: how they become text, and where it ends.
            emit: see `Job`.
            seconds: see `Job`.
            owner: see `Job`.
            entries: see `Job`.
        """
        super().__init__(emit, seconds, len(prefix) // CHARS_PER_TOKEN + len(ids), owner, entries)
        self.role: Role = "base"
        self.cache: RowCache = HeadwiseCache()
        self.position = self.token = 0
        self.max_new_tokens, self.done = max_new_tokens, False
        self._ids, self._memory, self._unread = ids, memory, unread
        self._prefix, self._prefix_options = prefix, prefix_options
        self._ends, self._sampler, self._transcript = ends, sampler, transcript

    def work(self, model: Network) -> Work:
        """Read the context; the first token of the answer is chosen at its end."""
        memory, self._memory = self._memory, None  # its states are in the cache soon; nobody else may need it
        stored = self._unread + (0 if memory is None else memory.num_tokens)
        if self._prefix and self._prefix_options is not None:
            made = yield from compress(model, self._prefix, self._prefix_options)
            memory = made if memory is None else consecutive(model, [memory, made])
        unread = self._unread + self._open(model, memory)
        nuggets, whole = 0 if memory is None else memory.num_nuggets, len(self._ids)
        tokens = self._unread + (0 if memory is None else memory.num_tokens) + whole
        del memory
        self.emit(ContextSize(tokens, stored, nuggets, whole, unread))
        prompt = self._embeds
        logits = torch.empty(0)
        for start in range(0, len(self._ids) or 1, TURN):
            ids = torch.tensor([self._ids[start : start + TURN]], dtype=torch.long, device=model.device)
            embeds = torch.cat([prompt, model.embed(ids)], dim=1)
            logits = read(model, self.role, self.cache, embeds, [self.position])
            self.position += embeds.shape[1]
            prompt = embeds[:, :0]
            if start + TURN < len(self._ids):
                yield len(self._ids) - start - TURN
        self.take(logits[0])

    def take(self, logits: Tensor) -> None:
        """Choose the next token by logits (V,), and say what that means for the text."""
        self.token = self._sampler.choose(logits)
        ended = self.token in self._ends
        text = "" if ended else self._transcript.push(self.token)
        tokens = self._transcript.num_tokens
        stopped = ended or self._transcript.stopped
        self.done = stopped or tokens == self.max_new_tokens
        if self.done:
            text += self._transcript.finish()
        if text:
            self.emit(Text(text))
        if self.done:
            self.emit(Finished("stop" if stopped else "length", tokens))

    def _open(self, model: Network, memory: Memory | None) -> int:
        """Put the memory before the prompt into the cache; returns how many of its tokens are not read."""
        room = len(self._ids) + self.max_new_tokens - 1  # the last token is not read
        if memory is None:
            model.require_positions(room)
            empty = BatchCache()
            empty.add((), (), room)
            self.cache = empty
            self._embeds = model.embed(torch.zeros(1, 0, dtype=torch.long, device=model.device))
            return 0
        before = prefix(model, memory, room)
        self.role, self.position, self._embeds = before.role, before.position, before.embeds
        self.cache = row_cache(before.cache, room + self._embeds.shape[1])
        return before.skipped


def compress(model: Network, text: str, options: CompressOptions) -> Generator[int, None, Memory]:
    """What `Nugget2D.compress` makes of `text`; yields how many tokens are left."""
    memories = yield from options.make().steps(model, [text], options.budget)
    return memories[0]
