"""Payloads that are read as text or as input embeddings, and the protocol of all payloads."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from nugget2d.memory.header import EmbeddingsPart, TextPart
from nugget2d.memory.states import States, StoreDtype

Kind = Literal["kv", "text", "embeddings"]


class Payload(Protocol):
    """The compressed content of a memory."""

    kind: ClassVar[Kind]

    @property
    def count(self) -> int:
        """Tokens, or vectors in the place of tokens, that a reader sees (k); of heads that differ, their mean."""

    @property
    def nbytes(self) -> int:
        """Bytes of what is read."""

    @property
    def dtype(self) -> StoreDtype:
        """How numbers are kept."""

    def to(self, dtype: StoreDtype) -> "Payload":
        """The same, kept as `dtype`."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, for a file."""

    def header(self) -> dict[str, Any]:
        """All else, as JSON, for a file."""


@dataclass(frozen=True, eq=False)
class TextPayload:
    """A shorter text in place of a longer one.

    Attributes:
        text: what is read.
        count: its tokens.
        spans: (m, 2) int32, the stretches of the source, as character offsets [start, end), that it was taken from.
    """

    kind: ClassVar[Kind] = "text"

    text: str
    count: int
    spans: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the text as UTF-8."""
        return len(self.text.encode())

    @property
    def dtype(self) -> StoreDtype:
        """A text has no numbers; the default."""
        return "float32"

    def to(self, dtype: StoreDtype) -> "TextPayload":
        """Itself: a text is not rounded."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """See `Payload`."""
        return {"text": torch.tensor(list(self.text.encode()), dtype=torch.uint8), "spans": self.spans}

    def header(self) -> dict[str, Any]:
        """See `Payload`."""
        return {"count": self.count}

    @staticmethod
    def from_parts(tensors: dict[str, Tensor], header: TextPart) -> "TextPayload":
        """The inverse of `tensors` and `header`.

        Raises:
            ValueError: the text is no UTF-8.
            KeyError: a tensor is missing.
        """
        text = tensors["text"]
        if text.dtype != torch.uint8 or text.dim() != 1:
            raise ValueError("text is no row of bytes")
        return TextPayload(text.numpy().tobytes().decode(), header.count, tensors["spans"])


@dataclass(frozen=True, eq=False)
class EmbeddingsPayload:
    """Vectors that are read like the embeddings of tokens.

    Attributes:
        vectors: `States` of shape (k, hidden_size).
        spans: (k, 2) int32, the characters [start, end) of the source that each stands for.
    """

    kind: ClassVar[Kind] = "embeddings"

    vectors: States
    spans: Tensor

    @property
    def count(self) -> int:
        """Vectors."""
        return self.vectors.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors and their scales."""
        return self.vectors.nbytes

    @property
    def dtype(self) -> StoreDtype:
        """How the vectors are kept."""
        return self.vectors.dtype

    def to(self, dtype: StoreDtype) -> "EmbeddingsPayload":
        """See `Payload`."""
        return replace(self, vectors=States.store(self.vectors.restore(), dtype))

    def tensors(self) -> dict[str, Tensor]:
        """See `Payload`."""
        return {**self.vectors.tensors("vectors"), "spans": self.spans}

    def header(self) -> dict[str, Any]:
        """See `Payload`."""
        return {}

    @staticmethod
    def from_parts(tensors: dict[str, Tensor], header: EmbeddingsPart) -> "EmbeddingsPayload":
        """The inverse of `tensors` and `header`."""
        return EmbeddingsPayload(States.from_tensors(tensors, "vectors"), tensors["spans"])
