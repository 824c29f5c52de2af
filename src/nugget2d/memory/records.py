"""Metadata of a memory: its segments, how it is read, and the method that made it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nugget2d.memory.fingerprint import Name


@dataclass(frozen=True)
class Segment:
    """A stretch of text that was compressed in one pass.

    `start` and `end` are character offsets into the whole text; of its `num_tokens` tokens `num_nuggets` were kept (by
    at least one head). `accuracy` is the share of its tokens that the model was measured to predict right from the
    states as they are kept, given the true tokens before (no patch); None if it was not measured.
    """

    start: int
    end: int
    num_tokens: int
    num_nuggets: int
    accuracy: float | None = None


@dataclass(frozen=True)
class ReaderSpec:
    """How a memory is read.

    Attributes:
        role: the weights: "base" is the LM as it is, "decoder" the decoder adapter.
        soft_prompt: whether the soft prompt "continue" is read after the memory.
        adapters: digest of decoder adapter and soft prompts; None where the base reads (and in version 1).
    """

    role: Literal["base", "decoder"] = "base"
    soft_prompt: bool = False
    adapters: str | None = None


@dataclass(frozen=True)
class MethodRecord:
    """The method that made a memory, by its name in the registry, and its configuration."""

    name: Name
    config: Mapping[str, Any] = field(default_factory=dict)
