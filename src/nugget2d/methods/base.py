"""`Method`: a frozen configuration that compresses texts into memories within a budget."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, TypeVar

from nugget2d.config import Frozen
from nugget2d.memory.memory import Memory, MethodRecord
from nugget2d.memory.payload import Kind
from nugget2d.memory.states import StoreDtype
from nugget2d.methods.budget import Budget
from nugget2d.modeling.network import Network

T = TypeVar("T")
M = TypeVar("M", bound="Method")
K = TypeVar("K", bound="KVMethod")
Progress = Callable[[int, int], None]  # (done, in all)


class Method(Frozen, ABC):
    """A compression method; its fields are its configuration, which its memories record.

    A new method is one file with a subclass, and one row in registry.py.

    Attributes:
        name: in the registry and in memories.
        payload: the kind of its memories.
        needs_training: whether it needs trained weights.
        query_agnostic: whether a memory is independent of later questions; else the question is needed to compress.
        source: the paper or system that it is from.
        default_ratio: tokens for each token kept, without a budget.
    """

    name: ClassVar[str]
    payload: ClassVar[Kind] = "kv"
    needs_training: ClassVar[bool] = False
    query_agnostic: ClassVar[bool] = True
    source: ClassVar[str]
    default_ratio: ClassVar[float] = 5.0

    @abstractmethod
    def compress(
        self, model: Network, texts: Sequence[str], budget: Budget | None, on_progress: Progress | None = None
    ) -> list[Memory]:
        """A memory of each text.

        Args:
            model: will read them.
            texts: none of them empty.
            budget: of each text; None takes `default_ratio`, or what the configuration determines.
            on_progress: called with (parts done, parts in all).

        Raises:
            InputError: an empty text, or an option or budget that cannot be met.
            ModelError: the model lacks what the method needs.
        """

    def steps(self, model: Network, texts: Sequence[str], budget: Budget | None) -> Generator[int, None, list[Memory]]:
        """The same in steps, so that a server can do other work in between; yields how many tokens are left.

        A method without steps compresses all texts at once.
        """
        yield from ()
        return self.compress(model, texts, budget)

    def bound(self: M, model: Network) -> M:
        """The same with options that were left open set for this model, as memories and stores record them."""
        return self

    @property
    def sets_budget(self) -> bool:
        """Whether the configuration determines how much is kept, so that no budget is given."""
        return False

    @property
    def record(self) -> MethodRecord:
        """The record for its memories."""
        return MethodRecord(self.name, self.model_dump(mode="json"))


class KVMethod(Method):
    """A method whose memories are keys and values.

    Attributes:
        dtype: how states are stored; None takes the model's own precision.
    """

    dtype: StoreDtype | None = None

    def bound(self: K, model: Network) -> K:
        """See `Method`."""
        return self if self.dtype is not None else self.model_copy(update={"dtype": native_dtype(model)})


def finish(steps: Generator[Any, None, T]) -> T:
    """What a generator returns when all of its steps are done."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: T = end.value
            return made


def native_dtype(model: Network) -> StoreDtype:
    """The default dtype for states of `model`."""
    return "bfloat16" if str(model.lm.dtype) == "torch.bfloat16" else "float32"
