"""What a job has for its client, as it comes."""

from dataclasses import dataclass
from typing import Literal

from nugget2d.memory.memory import Memory


@dataclass(frozen=True)
class ContextSize:
    """What stands before an answer, in tokens; the first event of one.

    Attributes:
        tokens: of the whole context as it was given.
        stored: those of them that stored memories stand for.
        nuggets: what is read in their place, and in place of a prompt's compressed prefix.
        whole: tokens read uncompressed.
        unread: those at the beginning that are beyond the model's reach.
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
