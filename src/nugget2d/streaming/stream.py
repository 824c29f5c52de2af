"""`Stream`: a language model that reads text of any length in bounded memory.

The last tokens are uncompressed, at least `recent_window` of them (tau in the paper). When there are recent_window +
chunk and another comes, the oldest chunk is compressed by itself, exactly as by `Nugget2D.compress`, and its nuggets
replace it. So all tokens of a chunk see the same nuggets, and results do not depend on how a text is divided into
calls. (The published method computes nuggets inside the stream, each seeing the nuggets before it, instead of segment
by segment.)
"""

import copy
from collections.abc import Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor

from nugget2d.deprecation import RenamedAttribute, renamed_keywords
from nugget2d.errors import InputError, ModelError
from nugget2d.inference.prompting import stop_tokens
from nugget2d.inference.sampling import Sampler
from nugget2d.memory.memory import Memory
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network
from nugget2d.streaming.feed import TextFeed
from nugget2d.streaming.past import Past
from nugget2d.streaming.window import Window
from nugget2d.text.detokenizer import IncrementalDetokenizer
from nugget2d.text.segmentation import require_tokens

DEFAULT_RATIO = 10.0

Tokens = str | Sequence[int] | Tensor


class Stream:
    """Made by `Nugget2D.stream`; it holds nuggets of the older text, and the recent tokens uncompressed.

    The decoder's cache has at most recent_window + chunk uncompressed tokens, one sink and the nuggets that fit into
    `config.context`. The cache before the last slide is kept beside it, for `rewind`.

    Attributes:
        recent_window: uncompressed tokens that there are at least, once so many have been read.
        chunk: tokens that are compressed at a time.
    """

    tau = RenamedAttribute("recent_window")
    num_whole = RenamedAttribute("num_uncompressed")

    @renamed_keywords(tau="recent_window")
    def __init__(
        self,
        model: Network,
        recent_window: int,
        ratio: float | None,
        max_nuggets: int | None,
        chunk: int | None,
        memory: Memory | None,
    ) -> None:
        """See `Nugget2D.stream`."""
        self.recent_window, self.chunk = recent_window, model.config.window if chunk is None else chunk
        self._model, self._most = model, max_nuggets
        self._rule = model.config.threshold or DEFAULT_RATIO if ratio is None else ratio
        _check(model, recent_window, ratio, max_nuggets, self.chunk)
        self._most_positions = _room(model, self.chunk) - recent_window  # for nuggets
        past = Past()
        if memory is not None:
            model.require(memory)
            if memory.reader.role != "decoder":
                raise InputError(
                    f"a stream cannot continue a memory of method {memory.method.name!r}, only those of nugget2d; "
                    "compress with method='nugget2d', or generate from this one"
                )
            past = Past.of(model, memory).within(max_nuggets)
        self._feed = TextFeed(model.tokenizer)
        self._window = self._open(past)
        self._before: Window | None = None

    # ---- sizes ----

    @property
    def num_tokens(self) -> int:
        """Tokens read; a word that is held back is not among them."""
        return self._window.past.tokens + len(self._window.ids)

    @property
    def num_uncompressed(self) -> int:
        """Tokens that are uncompressed."""
        return len(self._window.ids)

    @property
    def num_nuggets(self) -> int:
        """Nuggets held, whether or not their positions fit into `config.context`."""
        return self._window.past.num_nuggets

    @property
    def cache_size(self) -> int:
        """States that the decoder's cache holds at every layer."""
        return self._window.num_states

    @property
    def nbytes(self) -> int:
        """Bytes of the decoder's cache and the nuggets held."""
        return self._window.nbytes + sum(memory.nbytes for memory in self._window.past.memories)

    # ---- reading ----

    @renamed_keywords(piece="tokens")
    def append(self, tokens: Tokens) -> int:
        """Read `tokens`, and return how many were read.

        Args:
            tokens: text, or ids (any 1-D sequence). The last word of a text is held back until it is known to have
                ended: by more text, ids, or anything that asks for what comes next.

        Raises:
            InputError: lone surrogates, or ids that are no tokens of this model; the stream stays as it was.
        """
        ids = self._ids(tokens)
        for block in self._blocks(ids):
            self._window.read(block)
        return len(ids)

    @renamed_keywords(piece="tokens")
    def append_scored(self, tokens: Tokens) -> Tensor:
        """Read `tokens`, the last word too, and return their negative log-likelihoods in nats, (n,) float32.

        The very first token is not among them if nothing predicts it (no start token).

        Raises:
            InputError: as `append`.
        """
        ids = [*self._ids(tokens), *self._feed.flush()]
        losses = [torch.zeros(0)]
        for block in self._blocks(ids):
            first = self._window.logits
            logits = self._window.read_all(block)[:-1]
            if first is not None:
                logits = torch.cat([first[None], logits])
            targets = torch.tensor(block[len(block) - len(logits) :], device=logits.device)
            losses.append(token_losses(logits[None], targets[None])[0].cpu())
        return torch.cat(losses)

    @renamed_keywords(piece="tokens")
    def score(self, tokens: Tokens) -> float:
        """Mean negative log-likelihood of `tokens` as the continuation, in nats per token; they are not read.

        Raises:
            InputError: as `append`; no token to score.
        """
        losses = self._fork().append_scored(tokens)
        if not len(losses):
            raise InputError("nothing to score: the text is empty or a single token that nothing predicts")
        return float(losses.mean())

    @property
    def logits(self) -> Tensor:
        """(V,) logits of the token that comes next, after the last word.

        Raises:
            InputError: nothing was read, and the tokenizer has no start token.
        """
        self._finish()
        if self._window.logits is None:
            raise InputError("nothing to continue: append something first")
        return self._window.logits

    def generate(self, prompt: str = "", *, max_new_tokens: int = 64, temperature: float = 0.0) -> Iterator[str]:
        """Read `prompt` and generate a continuation, which the stream reads too.

        Args:
            prompt: what to continue; may be empty.
            max_new_tokens: at most so many tokens; fewer if the end of text comes, which is not read.
            temperature: of sampling; 0 takes the likeliest token every time.

        Returns:
            Parts of the text, each generated when it is asked for: stop iterating to stop generating.

        Raises:
            InputError: as `append`; max_new_tokens below 1, a temperature that is negative or not a number, nothing to
                continue.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        sampler = Sampler(temperature, seed=int(torch.randint(1 << 62, ())))  # repeatable by torch.manual_seed
        self.append(prompt)
        _ = self.logits  # an empty stream is refused here, not at the first part
        return self._texts(self._write(max_new_tokens, sampler))

    def rewind(self, count: int) -> None:
        """Undo the last `count` tokens, as if they had not been read.

        Raises:
            InputError: more than can be undone; at least the last `chunk` tokens can.
        """
        self._finish()
        window, before = self._window, self._before
        most = window.rewindable if before is None else window.fresh + before.rewindable
        if not 0 <= count <= most:
            raise InputError(f"cannot rewind {count} tokens: the last {most} can still be undone, no others")
        if before is not None and count >= window.fresh:
            self._window, self._before = before, None
            count -= window.fresh
        self._window.rewind(count)

    def memory(self) -> Memory:
        """Everything read, as a memory, except for nuggets that were evicted (`max_nuggets`). The stream is unchanged.

        Uncompressed tokens are compressed for it too, so a stream that starts from it predicts slightly differently.

        Raises:
            InputError: nothing was read.
        """
        self._finish()
        past, ids = self._window.past, self._window.ids
        for start in range(0, len(ids), self.chunk):
            past = past.add(self._model, ids[start : start + self.chunk], self._rule, self._most)
        if not past.memories:
            raise InputError("nothing was read: there is nothing to compress")
        return past.memory()

    # ---- internals ----

    def _ids(self, tokens: Tokens) -> list[int]:
        """Ids to read now."""
        if isinstance(tokens, str):
            return self._feed.push(tokens)
        ids = require_tokens(tokens, self._model.lm.config.vocab_size)
        return [*self._feed.flush(), *ids]

    def _finish(self) -> None:
        """Read the word that is held back."""
        for block in self._blocks(self._feed.flush()):
            self._window.read(block)

    def _blocks(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """`ids` in blocks for which there is room in the window, after sliding it."""
        done = 0
        while done < len(ids):
            if self.num_uncompressed == self.recent_window + self.chunk:
                self._slide()
            room = self.recent_window + self.chunk - self.num_uncompressed
            yield list(ids[done : done + room])
            done += room

    def _slide(self) -> None:
        before = self._window
        past = before.past.add(self._model, before.ids[: self.chunk], self._rule, self._most)
        self._window = before.slide(self.chunk, past, self._memory_length(past))
        self._before = before

    def _memory_length(self, past: Past) -> int:
        return min(past.tokens, self._most_positions)

    def _open(self, past: Past) -> Window:
        return Window.open(self._model, past, self._memory_length(past))

    def _fork(self) -> "Stream":
        """Another stream in the same state, which cannot be rewound across the last slide."""
        other = copy.copy(self)
        other._feed, other._window, other._before = self._feed.copy(), self._window.copy(), None
        return other

    def _write(self, count: int, sampler: Sampler) -> Iterator[int]:
        ends = stop_tokens(self._model.lm.generation_config, self._model.tokenizer)
        for _ in range(count):
            token = sampler.choose(self.logits)
            if token in ends:
                return
            self.append([token])
            yield token

    def _texts(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of tokens as they come."""
        detokenizer = IncrementalDetokenizer(self._model.tokenizer)
        for token in tokens:
            if text := detokenizer.push(token):
                yield text
        if text := detokenizer.finish():
            yield text


def _room(model: Network, chunk: int) -> int:
    """Positions for recent window and nuggets: one is the sink's, and a cache keeps W - 1 of a sliding window of W."""
    return model.config.context - 2 - chunk


def _check(model: Network, recent_window: int, ratio: float | None, most: int | None, chunk: int) -> None:
    """Refuse settings that cannot be streamed with."""
    model.require_compressor()
    if recent_window < 1:
        raise InputError(f"recent_window must be at least 1 token, got {recent_window}")
    if ratio is not None and not (ratio >= 1 and isfinite(ratio)):
        raise InputError(f"ratio must be at least 1 (1 keeps every token) and finite, got {ratio}")
    if most is not None and most < 1:
        raise InputError(f"max_nuggets must be at least 1, got {most}; None sets no limit")
    config = model.config
    if not 1 <= chunk <= config.window:
        raise InputError(f"chunk must be from 1 to the {config.window} tokens of {config.name!r}'s window, got {chunk}")
    largest = _room(model, chunk) - chunk  # room for the nuggets of one chunk at least
    if recent_window > largest:
        raise InputError(
            f"recent_window is {recent_window}, but {config.name!r} was trained on contexts of {config.context} "
            f"tokens: with chunks of {chunk} it can be {largest} at most"
        )
    try:
        _ = model.rotation
    except ModelError as error:
        raise ModelError(f"{config.name!r} cannot stream, its keys cannot move to other positions: {error}") from error
