"""What a method is: a frozen configuration that turns texts into memories within a budget."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import ClassVar, TypeVar

from nugget2d.config import Frozen
from nugget2d.memory.memory import Memory, MethodRecord
from nugget2d.memory.payload import Kind
from nugget2d.memory.states import StoreDtype
from nugget2d.methods.budget import Budget
from nugget2d.modeling.network import Network

M = TypeVar("M", bound="Method")
K = TypeVar("K", bound="KVMethod")
Progress = Callable[[int, int], None]  # (done, in all)


class Method(Frozen, ABC):
    """A way to compress; its fields are its configuration, which every memory that it makes records.

    A new method is one file with a subclass, and one row in registry.py.

    Attributes:
        name: how the registry, memories and users call it.
        payload: what its memories hold.
        needs_training: whether it needs weights trained for it.
        query_agnostic: whether a memory serves any later question; else it needs the question when it compresses.
        source: the paper or system that it is from.
        default_ratio: tokens for each token kept, where nobody says.
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
            model: who reads them later.
            texts: none of them empty.
            budget: of each text; None takes `default_ratio`, or what else the configuration says.
            on_progress: called with (parts done, parts in all).

        Raises:
            InputError: an empty text, or an option or budget that cannot be met.
            ModelError: the model lacks what the method needs.
        """

    def steps(self, model: Network, texts: Sequence[str], budget: Budget | None) -> Generator[int, None, list[Memory]]:
        """The same in pieces of work, for a server that does other work in between; yields how many tokens are left.

        A method that cannot pause does all of it at once.
        """
        yield from ()
        return self.compress(model, texts, budget)

    def bound(self: M, model: Network) -> M:
        """The same with what was left open chosen as for this model; memories and stores go by what was chosen."""
        return self

    @property
    def sets_budget(self) -> bool:
        """Whether the configuration says how much is kept, so that no budget has to."""
        return False

    @property
    def record(self) -> MethodRecord:
        """What its memories say of it."""
        return MethodRecord(self.name, self.model_dump(mode="json"))


class KVMethod(Method):
    """A method whose memories are keys and values.

    Attributes:
        dtype: how states are kept; None takes the model's own precision.
    """

    dtype: StoreDtype | None = None

    def bound(self: K, model: Network) -> K:
        """See `Method`."""
        return self if self.dtype is not None else self.model_copy(update={"dtype": native_dtype(model)})


def native_dtype(model: Network) -> StoreDtype:
    """How states are kept when nobody asks for another dtype."""
    return "bfloat16" if str(model.lm.dtype) == "torch.bfloat16" else "float32"
