"""The decoder's cache of a stream: [nuggets | sink | uncompressed tokens].

The sink is one input at position `memory_length`: the tokenizer's start token as long as nothing has left the window
(plain language modelling by the base), the soft prompt "continue" from then on, as in training. Nuggets have the
positions before it, uncompressed tokens those from `memory_length` + 1 on. The states of a token are computed once,
when it is read; only their keys are rotated, once `memory_length` has its maximum and stops growing (`Window.slide`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from nugget2d.modeling.cache import Nuggets, cached_states
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.streaming.past import Past


@dataclass(eq=False)
class Window:
    """The uncompressed tokens of a stream and the decoder's cache.

    Attributes:
        model: the decoder.
        past: what has left the window.
        memory_length: positions before the window, and so the position of the sink.
        cache: one row of [nuggets | sink | uncompressed tokens].
        ids: the uncompressed tokens.
        logits: (V,) what the decoder predicts next; None where nothing predicts the first token.
        carried: how many of these tokens were read before the window last slid.
    """

    model: Network
    past: Past
    memory_length: int
    cache: DynamicCache
    ids: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    carried: int = 0

    @staticmethod
    def open(model: Network, past: Past, memory_length: int) -> "Window":
        """A window without uncompressed tokens."""
        nuggets = past.nuggets(model, memory_length)
        cache = DynamicCache(config=model.lm.config) if nuggets is None else nuggets.to_cache(model.lm.config)
        window = Window(model, past, memory_length, cache)
        window._read_sink()
        return window

    @property
    def num_states(self) -> int:
        """States in the cache, at every layer."""
        return self.cache.get_seq_length()

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens."""
        self.logits = self._forward(self._embed(ids), self.memory_length + 1 + len(self.ids), 1)[-1]
        self.ids += ids

    def read_all(self, ids: Sequence[int]) -> Tensor:
        """Read tokens; (len(ids), V) logits after each of them."""
        logits = self._forward(self._embed(ids), self.memory_length + 1 + len(self.ids), 0)
        self.logits = logits[-1]
        self.ids += ids
        return logits

    def slide(self, chunk: int, past: Past, memory_length: int) -> "Window":
        """The window after its first `chunk` tokens have become the last segment of `past`."""
        window = Window.open(self.model, past, memory_length)
        rest = self._part(self.num_states - len(self.ids) + chunk, self.num_states)
        shift = memory_length - self.memory_length - chunk
        keys = self.model.rotation(rest.keys, torch.full((1, rest.count), shift)) if shift else rest.keys
        for layer, (key, value) in enumerate(zip(keys, rest.values, strict=True)):
            window.cache.update(key, value, layer)
        window.ids, window.logits, window.carried = self.ids[chunk:], self.logits, rest.count
        return window

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        keys, values = cached_states(self.cache)
        return sum(states.nbytes for states in (*keys, *values))

    @property
    def fresh(self) -> int:
        """Uncompressed tokens read since the window last slid."""
        return len(self.ids) - self.carried

    @property
    def rewindable(self) -> int:
        """Tokens that `rewind` can take back: a carried token could not be read again as it was."""
        return max(0, self.fresh - 1) if self.carried else self.fresh

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens, at most `rewindable`."""
        if count == 0:
            return
        last = len(self.ids) - count - 1
        self.cache = self._part(0, self.num_states - count - 1).to_cache(self.model.lm.config)
        if last >= 0:  # read the token that is now the last again, for its logits
            again = self.ids[last]
            self.ids = self.ids[:last]
            self.read([again])
        else:
            self.ids, self.logits = [], None
            self._read_sink()

    def copy(self) -> "Window":
        """An independent window in the same state."""
        cache = self._part(0, self.num_states).to_cache(self.model.lm.config)
        return Window(self.model, self.past, self.memory_length, cache, list(self.ids), self.logits, self.carried)

    def _read_sink(self) -> None:
        model = self.model
        if self.past.tokens:
            self.logits = self._forward(model.prompt("continue", 1).to(model.lm.dtype), self.memory_length, 1)[-1]
        elif model.start_token is not None:
            self.logits = self._forward(self._embed([model.start_token]), self.memory_length, 1)[-1]

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.model.embed(torch.tensor([ids], device=self.model.device))

    @torch.no_grad()
    def _forward(self, embeds: Tensor, position: int, logits_to_keep: int) -> Tensor:
        """(q or `logits_to_keep`, V) logits of inputs (1, q, d) that follow what is in the cache."""
        before, steps = self.num_states, torch.arange(embeds.shape[1], device=embeds.device)
        role: Role = "decoder" if self.past.tokens else "base"
        try:
            with self.model.parameters_by_role.role(role) as lm:
                return lm(
                    inputs_embeds=embeds,
                    position_ids=position + steps[None],
                    **as_cache(lm, self.cache),
                    use_cache=True,
                    logits_to_keep=logits_to_keep,
                ).logits[0]
        except BaseException:  # an interrupt too: some layers have cached the inputs, others have not
            self.cache = self._part(0, before).to_cache(self.model.lm.config)
            raise

    def _part(self, start: int, end: int) -> Nuggets:
        """The states from `start` to `end`, along the token axis."""
        keys, values = cached_states(self.cache)
        return Nuggets([key[:, :, start:end] for key in keys], [value[:, :, start:end] for value in values])
