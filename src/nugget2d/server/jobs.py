"""What an engine does for one client: make a memory, or write an answer.

A job's `work` is a generator that stops after every piece of work, so that the engine can continue others in between
and drop a job that nobody waits for. What it has for its client goes through `emit`, at once and without waiting.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from nugget2d.inference.reading import text_nuggets
from nugget2d.inference.sampling import Sampler
from nugget2d.memory.memory import Memory
from nugget2d.memory.states import StoreDtype
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.server.batch_cache import BatchCache, read
from nugget2d.server.compression import compress, consecutive
from nugget2d.server.events import ContextSize, Event, Finished, Made, Text
from nugget2d.text.detokenizer import Transcript
from nugget2d.text.segmentation import Piece

# Tokens of a prompt read at a time: running answers wait for so many, and long prompts lose little by the cuts.
TURN = 256

# yields how many tokens are left to read, after every piece of work
Work = Generator[int, None, None]


class Job(ABC):
    """One request to an engine.

    Attributes:
        emit: takes every event, in the engine's thread; it must neither wait nor raise.
        deadline: when `time.monotonic` will have passed this, the job fails.
        size: tokens that it will read.
        cancelled: see `cancel`.
    """

    def __init__(self, emit: Callable[[Event], None], seconds: float, size: int) -> None:
        """A job of `size` tokens that fails if it takes more than `seconds` from now on."""
        self.emit, self.size = emit, size
        self.deadline = time.monotonic() + seconds
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody waits for it any longer; the engine drops it before its next step. From any thread."""
        self.cancelled = True

    @abstractmethod
    def work(self, model: Network) -> Work:
        """All that is done for this job alone."""


class Compression(Job):
    """A text becomes a memory, `Made` at the end."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        ratio: float,
        dtype: StoreDtype | None,
        *,
        emit: Callable[[Event], None],
        seconds: float,
    ) -> None:
        """See `compression.compress`."""
        super().__init__(emit, seconds, sum(len(piece.ids) for piece in pieces))
        self._pieces, self._ratio, self._dtype = pieces, ratio, dtype

    def work(self, model: Network) -> Work:
        """Compress segment after segment."""
        memory = yield from compress(model, self._pieces, self._ratio, self._dtype)
        self.emit(Made(memory))


class Generation(Job):
    """A prompt, perhaps after memories, is continued: `ContextSize`, then `Text` as it comes, then `Finished`.

    Attributes:
        role: with which weights it is read.
        cache: after `work`: a single row, all that was read.
        position: where the next input stands.
        token: the next input, the last token of the answer so far.
        max_new_tokens: the answer's length at most.
        done: the answer is complete.
    """

    def __init__(
        self,
        ids: Sequence[int],
        *,
        memory: Memory | None = None,
        prefix: Sequence[Piece] = (),
        prefix_ratio: float = 1,
        max_new_tokens: int,
        ends: frozenset[int],
        sampler: Sampler,
        transcript: Transcript,
        emit: Callable[[Event], None],
        seconds: float,
    ) -> None:
        """Continue [memory | prefix, compressed | ids].

        Args:
            ids: tokens to be read uncompressed.
            memory: what was stored.
            prefix: what stands between them and is to be compressed.
            prefix_ratio: its tokens for each nugget.
            max_new_tokens: at most so many.
            ends: tokens that end the answer.
            sampler: how tokens are chosen.
            transcript: how they become text, and where it ends.
            emit: see `Job`.
            seconds: see `Job`.
        """
        super().__init__(emit, seconds, sum(len(piece.ids) for piece in prefix) + len(ids))
        self.role: Role = "decoder" if prefix or memory is not None else "base"
        self.cache = BatchCache()
        self.position = self.token = 0
        self.max_new_tokens, self.done = max_new_tokens, False
        self._ids, self._memory, self._prefix, self._prefix_ratio = ids, memory, prefix, prefix_ratio
        self._ends, self._sampler, self._transcript = ends, sampler, transcript

    def work(self, model: Network) -> Work:
        """Read the context; the first token of the answer is chosen at its end."""
        memory, stored = self._memory, 0 if self._memory is None else self._memory.num_tokens
        if self._prefix:
            prefix = yield from compress(model, self._prefix, self._prefix_ratio, None)
            memory = prefix if memory is None else consecutive(model, [memory, prefix])
        prompt = self._open(model, memory)
        skipped = 0 if memory is None else memory.num_tokens - self.position
        nuggets, whole = self.cache.lengths[0], len(self._ids)
        tokens = (0 if memory is None else memory.num_tokens) + whole
        self.emit(ContextSize(tokens, stored, nuggets, whole, skipped))
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

    def _open(self, model: Network, memory: Memory | None) -> Tensor:
        """Put the nuggets in the cache; returns the soft prompt (1, 1, d) that follows them, or (1, 0, d)."""
        room = len(self._ids) + self.max_new_tokens  # a soft prompt too: the last token is not read
        if memory is None:
            model.require_positions(room - 1)
            self.cache.add((), (), room)
            return model.embed(torch.zeros(1, 0, dtype=torch.long, device=model.device))
        nuggets, self.position = text_nuggets(model, memory, room)
        model.require_positions(self.position + room, slots=nuggets.count + room)
        self.cache.add(nuggets.keys, nuggets.values, nuggets.count + room)
        return model.prompt("continue", 1).to(model.lm.dtype)
