"""Appended memory tokens: learned embeddings stand after the text; their states in the encoder are the memory.

As in ICAE (arXiv 2307.06945), with two differences: the decoder gets their keys and values at every layer, as it gets
those of nuggets, and a memory of k takes the first k of all memory tokens, so that one model serves every ratio. Those
that training never asked for stay as they were drawn.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nugget2d.config import NuggetConfig, SelectionName
from nugget2d.model import Nugget2D
from nugget2d.modeling.cache import gather_nuggets
from nugget2d.modeling.network import Encoded
from nugget2d.modeling.selection import select
from nugget2d.training.plugins import Plugin
from research.memories.unsaved import UnsavedMemory


class AppendedTokensMemory(UnsavedMemory):
    """`config.window` memory tokens, so many as a window could ask for at most.

    Each sees the whole text, and the memory tokens before it. Their POSITIONS are those that evenly chosen nuggets
    would have (ICAE: after the text), so that a decoder still finds a token at a fixed distance from the memory token
    that carries it; relative offsets and the read-out loss then work as they do for nuggets. At positions after the
    text they learned nothing in as many tokens (LOG.md).
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: NuggetConfig) -> None:
        """Draw the memory tokens like tokens of the vocabulary."""
        super().__init__(lm, tokenizer, config)
        words = self._embeddings.weight.detach().float()
        noise = torch.randn(config.window, words.shape[1]).to(words)
        self.memory_tokens = nn.Parameter(words.mean(0) + noise * words.std())

    def small_parameters(self) -> list[nn.Parameter]:
        """Soft prompts, flag and memory tokens."""
        return [*super().small_parameters(), self.memory_tokens]

    def encode(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        selection: SelectionName | None = None,
        generator: torch.Generator | None = None,
        scores: Tensor | None = None,
    ) -> Encoded:
        """See `Network.encode`; `selection` is ignored, `index` are the positions of the memory tokens."""
        index, valid = select("even", ids, lengths, counts)
        count, length = index.shape[1], ids.shape[1]
        number = (valid.cumsum(1) - 1).clamp(min=0)  # memories are left-padded: a row's first one need not be column 0
        appended = self.memory_tokens[number]
        if self.flag is not None:
            appended = appended + self.flag
        tokens = torch.arange(length, device=ids.device).expand_as(ids)
        real = tokens < torch.as_tensor(lengths, device=ids.device)[:, None]
        embeds = self.embed(ids)
        cache = self.encoder_states(
            torch.cat([embeds, appended.to(embeds.dtype)], dim=1),
            mask=torch.cat([real, valid], dim=1).long(),
            positions=torch.cat([tokens, index], dim=1),
        )
        places = torch.arange(length, length + count, device=ids.device).expand_as(index)
        return Encoded(gather_nuggets(cache, places, valid), index, valid)


class AppendedTokens(Plugin):
    """Trains `AppendedTokensMemory`."""

    memory: ClassVar[type[Nugget2D] | None] = AppendedTokensMemory
