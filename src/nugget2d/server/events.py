"""Events that a job sends to its client."""

from dataclasses import dataclass
from typing import Literal

from nugget2d.memory.memory import Memory


@dataclass(frozen=True)
class ContextSize:
    """The context of an answer, in tokens; the first event of each answer.

    Attributes:
        tokens: of the whole context as it was given.
        stored: those of them that are in stored memories.
        nuggets: what is read in their place, and in place of a prompt's compressed prefix.
        whole: tokens read uncompressed.
        unread: those at the start that are not read, as the model has no positions for them.
    """

    tokens: int
    stored: int
    nuggets: int
    whole: int
    unread: int


@dataclass(frozen=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The answer is complete: it ended by itself or at a stop string, or has as many tokens as were asked for."""

    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True, eq=False)
class Made:
    """A memory is ready."""

    memory: Memory


@dataclass(frozen=True, eq=False)
class Failed:
    """There will be no more."""

    error: Exception


Event = ContextSize | Text | Finished | Made | Failed
