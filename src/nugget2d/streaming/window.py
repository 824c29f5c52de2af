"""What the decoder sees of a stream: a cache of [nuggets | head | whole tokens].

The head is one input at position `border`: the tokenizer's start token as long as nothing has left the window, so that
all is plain language modelling by the base; the soft prompt "continue" from then on, where continuation from a memory
was trained to have it. Whole tokens follow at border + 1, nuggets stand before it. A token's states are computed once,
when it is read, and only turned to other positions when the border stops moving (`Window.slide`).
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
    """The whole tokens of a stream and the decoder's cache.

    Attributes:
        model: who reads.
        past: what has left the window.
        border: the position of the head.
        cache: one row of [nuggets | head | whole tokens].
        ids: the whole tokens.
        logits: (V,) what the decoder predicts next; None where nothing predicts the first token.
        carried: how many of the whole tokens were read before the window last slid.
    """

    model: Network
    past: Past
    border: int
    cache: DynamicCache
    ids: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    carried: int = 0

    @staticmethod
    def open(model: Network, past: Past, border: int) -> "Window":
        """A window without whole tokens."""
        nuggets = past.nuggets(model, border)
        cache = DynamicCache(config=model.lm.config) if nuggets is None else nuggets.to_cache(model.lm.config)
        window = Window(model, past, border, cache)
        window._read_head()
        return window

    @property
    def slots(self) -> int:
        """States in the cache."""
        return self.cache.get_seq_length()

    def read(self, ids: Sequence[int]) -> None:
        """Take in whole tokens."""
        self.logits = self._forward(self._embed(ids), self.border + 1 + len(self.ids), 1)[-1]
        self.ids += ids

    def read_all(self, ids: Sequence[int]) -> Tensor:
        """Take in whole tokens; (len(ids), V) what is predicted after each of them."""
        logits = self._forward(self._embed(ids), self.border + 1 + len(self.ids), 0)
        self.logits = logits[-1]
        self.ids += ids
        return logits

    def slide(self, chunk: int, past: Past, border: int) -> "Window":
        """The window after its first `chunk` tokens have become the last segment of `past`."""
        window = Window.open(self.model, past, border)
        rest = self._part(self.slots - len(self.ids) + chunk, self.slots)
        shift = border - self.border - chunk
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
        """Whole tokens read since the window last slid."""
        return len(self.ids) - self.carried

    @property
    def rewindable(self) -> int:
        """Tokens that `rewind` can take back: a carried token could not be read again as it was."""
        return max(0, self.fresh - 1) if self.carried else self.fresh

    def rewind(self, count: int) -> None:
        """Forget the last `count` whole tokens, at most `rewindable`."""
        if count == 0:
            return
        last = len(self.ids) - count - 1
        self.cache = self._part(0, self.slots - count - 1).to_cache(self.model.lm.config)
        if last >= 0:  # once more the token that is now the last, for what it predicts
            again = self.ids[last]
            self.ids = self.ids[:last]
            self.read([again])
        else:
            self.ids, self.logits = [], None
            self._read_head()

    def copy(self) -> "Window":
        """An independent window in the same state."""
        cache = self._part(0, self.slots).to_cache(self.model.lm.config)
        return Window(self.model, self.past, self.border, cache, list(self.ids), self.logits, self.carried)

    def _read_head(self) -> None:
        model = self.model
        if self.past.tokens:
            self.logits = self._forward(model.prompt("continue", 1).to(model.lm.dtype), self.border, 1)[-1]
        elif model.start_token is not None:
            self.logits = self._forward(self._embed([model.start_token]), self.border, 1)[-1]

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.model.embed(torch.tensor([ids], device=self.model.device))

    @torch.no_grad()
    def _forward(self, embeds: Tensor, position: int, logits_to_keep: int) -> Tensor:
        """(q or `logits_to_keep`, V) logits of inputs (1, q, d) that follow what is in the cache."""
        slots, steps = self.slots, torch.arange(embeds.shape[1], device=embeds.device)
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
            self.cache = self._part(0, slots).to_cache(self.model.lm.config)
            raise

    def _part(self, start: int, end: int) -> Nuggets:
        """The states of some slots."""
        keys, values = cached_states(self.cache)
        return Nuggets([key[:, :, start:end] for key in keys], [value[:, :, start:end] for value in values])
