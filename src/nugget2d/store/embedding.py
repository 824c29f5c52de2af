"""What a memory is about, as vectors pooled from its nuggets' own states, and search by them."""

from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from nugget2d.memory import Memory


@dataclass(frozen=True, eq=False)
class Embedding:
    """One vector for each segment of a memory.

    Attributes:
        vectors: (segments, d) float16.
        spans: (segments, 2) int32, the characters that each segment stands for.
    """

    vectors: NDArray[np.float16]
    spans: NDArray[np.int32]

    @staticmethod
    def of(memory: Memory) -> "Embedding":
        """Pool the values of every segment's nuggets; values know nothing of positions, keys are rotated by them."""
        values = memory.values[len(memory.values) // 2].restore()  # (heads, k, head_dim)
        pooled = [values[:, part].mean(1).flatten() for part in memory.segment_slices]
        return Embedding(
            np.stack([vector.numpy() for vector in pooled]).astype(np.float16),
            np.array([(segment.start, segment.end) for segment in memory.segments], dtype=np.int32),
        )

    def to_bytes(self) -> bytes:
        """For a store's index."""
        return safetensors.numpy.save({"vectors": self.vectors, "spans": self.spans})

    @staticmethod
    def from_bytes(data: bytes) -> "Embedding":
        """What `to_bytes` gave."""
        tensors = safetensors.numpy.load(data)
        return Embedding(tensors["vectors"], tensors["spans"])
