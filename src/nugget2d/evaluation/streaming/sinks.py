"""StreamingLLM (arXiv 2309.17453): the start token and the first tokens as attention sinks, and the last ones.

Positions are counted within the cache, as published: the sinks come right before the recent tokens, however far away
they were read. Attention with rotary keys depends on distances only, so the keys of the sinks are rotated here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from nugget2d.modeling.cache import Nuggets, cached_states
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.network import Network
from nugget2d.streaming.layout import Layout
from nugget2d.streaming.parallel import mixed_logits

SINKS = 4


@dataclass(frozen=True)
class Sinks:
    """The base LM with `SINKS` sinks and recent tokens; states are computed once, when a token is read.

    Attributes:
        model: its base reads.
        states: sinks and recent tokens that the last query of a chunk sees.
        chunk: tokens between two slides.
    """

    model: Network
    states: int
    chunk: int

    @torch.no_grad()
    def __call__(self, ids: Tensor, first: int) -> Tensor:
        """See `Reader`."""
        given, ids = len(ids), self.model.after_start(ids[None])[0]
        first += len(ids) - given
        window = self.states - SINKS - self.chunk
        layout = Layout.over(len(ids) - 1, recent_window=window, chunk=self.chunk, visible_segments=1)
        padded = torch.nn.functional.pad(ids[:-1], (0, layout.length - len(ids) + 1))[None]
        logits = mixed_logits(self.model, self._sinks(ids, layout), padded, layout, role="base")
        return token_losses(logits[:, first - 1 : len(ids) - 1], ids[None, first:])[0]

    def _sinks(self, ids: Tensor, layout: Layout) -> Nuggets:
        """The sinks once for each step after the first, in place of the nuggets of its only visible segment."""
        cache = DynamicCache(config=self.model.lm.config)
        with self.model.parameters_by_role.role("base") as lm:
            lm(input_ids=ids[None, :SINKS], **as_cache(lm, cache), use_cache=True)
        keys, values = ([layer.repeat(1, 1, layout.segments, 1) for layer in states] for states in cached_states(cache))
        # recent tokens of step s start at s * chunk + 1, see `Layout.tokens`; sink i was read at i
        step = torch.arange(1, layout.steps, device=ids.device).repeat_interleave(SINKS)
        return Nuggets(self.model.rotation(keys, (step * layout.chunk + 1 - SINKS)[None]), values)
