"""What an engine does for one client: make a memory, or write an answer.

A job's `work` is a generator that stops after every piece of work, so that the engine can go on with others in between
and drop a job that nobody waits for. What it has for its client goes through `emit`, at once and without waiting.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nugget2d.inference.reading import text_nuggets
from nugget2d.inference.sampling import Sampler
from nugget2d.memory.memory import Memory
from nugget2d.memory.states import StoreDtype
from nugget2d.methods.nugget.encoding import encode, native_dtype
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.modeling.selection import count_nuggets
from nugget2d.server.slots import Slots, read
from nugget2d.text.detokenizer import Transcript
from nugget2d.text.segmentation import Piece

# Tokens read or compressed at a time: running answers wait for so many, and long prompts lose little by the cuts.
TURN = 256


@dataclass(frozen=True)
class Context:
    """What stands before an answer, in tokens.

    Attributes:
        tokens: of the whole context as it was given.
        stored: those of them that stored memories stand for.
        nuggets: what is read in their place, and in place of a prompt's compressed head.
        whole: tokens read whole.
        unread: those at the beginning that are beyond the model's reach.
    """

    tokens: int
    stored: int
    nuggets: int
    whole: int
    unread: int


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The answer is complete: it ended by itself or at a stop string, or has as many tokens as were asked for."""

    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True, eq=False)
class Made:
    """A memory is ready."""

    memory: Memory


@dataclass(frozen=True, eq=False)
class Failed:
    """There will be no more."""

    error: Exception


Event = Context | Text | Finished | Made | Failed
# yields how many tokens are left to read, after every piece of work
Work = Generator[int, None, None]


class Job(ABC):
    """One request to an engine.

    Attributes:
        emit: takes every event, in the engine's thread; it must not wait.
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
        """`pieces` of a text (`segmentation.split`), one nugget for `ratio` tokens, kept as `dtype`."""
        super().__init__(emit, seconds, sum(len(piece.ids) for piece in pieces))
        self._pieces, self._ratio, self._dtype = pieces, ratio, dtype

    def work(self, model: Network) -> Work:
        """Compress segment after segment."""
        memory = yield from compress(model, self._pieces, self._ratio, self._dtype or native_dtype(model))
        self.emit(Made(memory))


class Generation(Job):
    """A prompt, perhaps after memories, is continued: `Context`, then `Text` as it comes, then `Finished`.

    Attributes:
        role: with which weights it is read.
        slots: after `work`: a single row, all that was read.
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
        head: Sequence[Piece] = (),
        head_ratio: float = 1,
        max_new_tokens: int,
        sampler: Sampler,
        transcript: Transcript,
        emit: Callable[[Event], None],
        seconds: float,
    ) -> None:
        """Continue [memory | head, compressed | ids].

        Args:
            ids: tokens to be read whole.
            memory: what was stored.
            head: what stands between them and is to be compressed.
            head_ratio: its tokens for each nugget.
            max_new_tokens: at most so many.
            sampler: how tokens are chosen.
            transcript: how they become text, and where it ends.
            emit: see `Job`.
            seconds: see `Job`.
        """
        super().__init__(emit, seconds, sum(len(piece.ids) for piece in head) + len(ids))
        self.role: Role = "decoder" if head or memory is not None else "base"
        self.slots = Slots()
        self.position = self.token = 0
        self.max_new_tokens, self.done = max_new_tokens, False
        self._ends: frozenset[int] = frozenset()
        self._ids, self._memory, self._head, self._head_ratio = ids, memory, head, head_ratio
        self._sampler, self._transcript = sampler, transcript

    def work(self, model: Network) -> Work:
        """Read the context; the first token of the answer is chosen at its end."""
        self._ends = end_tokens(model)
        memory, stored = self._memory, 0 if self._memory is None else self._memory.num_tokens
        if self._head:
            head = yield from compress(model, self._head, self._head_ratio, native_dtype(model))
            memory = head if memory is None else consecutive(model, [memory, head])
        prompt = self._open(model, memory)
        skipped = 0 if memory is None else memory.num_tokens - self.position
        nuggets, whole = self.slots.lengths[0], len(self._ids)
        tokens = (0 if memory is None else memory.num_tokens) + whole
        self.emit(Context(tokens, stored, nuggets, whole, skipped))
        logits = torch.empty(0)
        for start in range(0, len(self._ids) or 1, TURN):
            ids = torch.tensor([self._ids[start : start + TURN]], dtype=torch.long, device=model.device)
            embeds = torch.cat([prompt, model.embed(ids)], dim=1)
            logits = read(model, self.role, self.slots, embeds, [self.position])
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
        """Put the nuggets in their slots; returns the soft prompt (1, 1, d) that follows them, or (1, 0, d)."""
        room = len(self._ids) + self.max_new_tokens  # a soft prompt too: the last token is not read
        if memory is None:
            model.require_positions(room - 1)
            self.slots.add((), (), room)
            return model.embed(torch.zeros(1, 0, dtype=torch.long, device=model.device))
        nuggets, self.position = text_nuggets(model, memory, room)
        model.require_positions(self.position + room, slots=nuggets.count + room)
        self.slots.add(nuggets.keys, nuggets.values, nuggets.count + room)
        return model.prompt("continue", 1).to(model.lm.dtype)


def compress(model: Network, pieces: Sequence[Piece], ratio: float, dtype: StoreDtype) -> Generator[int, None, Memory]:
    """What `Nugget2D.compress` makes of the same pieces, a few segments at a time; yields how many tokens are left."""
    lengths = [len(piece.ids) for piece in pieces]
    counts = count_nuggets(lengths, ratio)
    left, done, memories = sum(lengths), 0, []
    while done < len(pieces):
        end = done + 1
        while end < len(pieces) and sum(lengths[done : end + 1]) <= TURN:
            end += 1
        drafts = encode(model, pieces[done:end], counts[done:end], model.config.selection, dtype)
        memories += [draft.memory for draft in drafts]
        left -= sum(lengths[done:end])
        done = end
        if left:
            yield left
    return Memory.join(memories)


def consecutive(model: Network, memories: Sequence[Memory]) -> Memory:
    """Memories of texts that follow each other as one, whatever their states were kept as."""
    if len({memory.dtype for memory in memories}) > 1 or len({memory.exact is None for memory in memories}) > 1:
        memories = [replace(memory, exact=None).to(native_dtype(model)) for memory in memories]
    return Memory.join(memories)


def end_tokens(model: Network) -> frozenset[int]:
    """Tokens that end a text: those that transformers' `generate` stops at, and the tokenizer's."""
    listed = getattr(model.lm.generation_config, "eos_token_id", None)
    tokens = listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in (*tokens, model.tokenizer.eos_token_id) if token is not None)
