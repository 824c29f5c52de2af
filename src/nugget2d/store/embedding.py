"""What the parts of a memory are about: vectors pooled from its nuggets' own states, and how near a query is to them.

A segment's vector is the mean of its nuggets' values at the first layer: those are linear in what the chosen tokens
are, and know nothing of positions. Vectors of one model are centred and whitened together before they are compared,
which takes away what all texts share (compare the whitening of sentence embeddings, Su et al. 2021, arXiv 2103.15316).
Tokens that were not chosen are not in it: the higher the ratio, the less is found (benchmarks/store_search.py).
"""

from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from nugget2d.memory import Memory

# Share of the mean variance that is added to all: directions that hardly vary are noise.
SHRINKAGE = 0.01


@dataclass(frozen=True, eq=False)
class Embedding:
    """One vector for each segment of a memory.

    Attributes:
        vectors: (segments, d) float16, d = kv_heads x head_dim.
        spans: (segments, 2) int32, the characters that each segment stands for.
    """

    vectors: NDArray[np.float16]
    spans: NDArray[np.int32]

    @staticmethod
    def of(memory: Memory) -> "Embedding":
        """Pool the nuggets of every segment."""
        values = memory.values[0].restore()  # (kv_heads, k, head_dim)
        pooled = [values[:, part].mean(1).flatten().numpy() for part in memory.segment_slices]
        spans = [(segment.start, segment.end) for segment in memory.segments]
        return Embedding(np.stack(pooled).astype(np.float16), np.array(spans, dtype=np.int32))

    def to_bytes(self) -> bytes:
        """For a store's index."""
        return safetensors.numpy.save({"vectors": self.vectors, "spans": self.spans})

    @staticmethod
    def from_bytes(data: bytes) -> "Embedding":
        """What `to_bytes` gave."""
        tensors = safetensors.numpy.load(data)
        return Embedding(tensors["vectors"], tensors["spans"])


def similarities(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of `query` (d,) with each of `vectors` (N, d), all centred and whitened by the statistics of `vectors`."""
    mean = vectors.mean(0)
    centred = vectors - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(vectors))
    floor = SHRINKAGE * variances.mean() + np.finfo(np.float32).tiny
    whiten = axes / np.sqrt(variances.clip(0) + floor)
    rows, wanted = centred @ whiten, (query - mean) @ whiten
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted)
    return rows @ wanted / np.maximum(lengths, np.finfo(np.float32).tiny)
