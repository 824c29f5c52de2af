"""The words of a memory, decoded from its states, and their relevance to a query (BM25).

Every token that is decoded from a state (inference/token_decoding.py) counts as one; the scores of all segments are a
product of the sparse matrix of these counts, weighted by BM25 (Robertson and Zaragoza 2009), with the query's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from nugget2d.inference.token_decoding import decode_tokens
from nugget2d.memory.memory import Memory
from nugget2d.model import Nugget2D

# BM25's usual constants: saturation of repeated tokens (k1), and penalty of long segments (b)
SATURATION, LENGTH = 1.2, 0.75


@dataclass(frozen=True, eq=False)
class Words:
    """The tokens of each segment of a memory.

    Attributes:
        tokens: (m,) int32 ids, segment after segment.
        counts: (segments,) int32, how many of them are of each segment.
        spans: (segments, 2) int32, the characters that each segment stands for.
    """

    tokens: NDArray[np.int32]
    counts: NDArray[np.int32]
    spans: NDArray[np.int32]

    @staticmethod
    def of(memory: Memory, model: Nugget2D) -> "Words":
        """The tokens that are decoded from a memory by `model`, which made it."""
        parts = decode_tokens(model, memory)
        spans = [(segment.start, segment.end) for segment in memory.segments]
        if memory.kind != "kv":  # read as a whole
            spans = [(0, memory.num_chars)]
        counts = np.array([len(part) for part in parts], dtype=np.int32)
        return Words(torch.cat(parts).numpy().astype(np.int32), counts, np.array(spans, dtype=np.int32))

    @staticmethod
    def of_text(memory: Memory, model: Nugget2D, text: str) -> "Words":
        """All tokens of the text that a memory was made of."""
        spans = [(segment.start, segment.end) for segment in memory.segments]
        parts = [model.ids(text[start:end])[0].cpu().numpy().astype(np.int32) for start, end in spans]
        counts = np.array([len(part) for part in parts], dtype=np.int32)
        return Words(np.concatenate(parts), counts, np.array(spans, dtype=np.int32))

    def to_bytes(self) -> bytes:
        """For a store's index."""
        return safetensors.numpy.save({"tokens": self.tokens, "counts": self.counts, "spans": self.spans})

    @staticmethod
    def from_bytes(data: bytes) -> "Words":
        """The inverse of `to_bytes`."""
        return Words(**safetensors.numpy.load(data))


def relevance(words: Sequence[Words], query: Sequence[int]) -> list[NDArray[np.float64]]:
    """The relevance of each segment of every memory to a query of token ids: BM25 over all these segments."""
    counts = np.concatenate([one.counts for one in words])
    tokens = np.concatenate([one.tokens for one in words])
    segment = np.repeat(np.arange(len(counts)), counts)
    norms = SATURATION * (1 - LENGTH + LENGTH * counts / max(counts.mean(), 1))
    scores = np.zeros(len(counts))
    for token in sorted(set(query)):
        often = np.bincount(segment[tokens == token], minlength=len(counts))
        having = np.count_nonzero(often)
        rarity = np.log1p((len(counts) - having + 0.5) / (having + 0.5))
        scores += rarity * often * (SATURATION + 1) / (often + norms)
    return np.split(scores, np.cumsum([len(one.counts) for one in words])[:-1])
