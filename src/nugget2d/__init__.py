"""nugget2d: dynamic context compression for decoder-only language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nugget2d.memory.memory import Memory
    from nugget2d.model import Nugget2D

__version__ = "0.1.0"
__all__ = ["Memory", "Nugget2D", "__version__"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import; `nugget2d --help` must not wait for it
    if name == "Memory":
        from nugget2d.memory.memory import Memory

        return Memory
    if name == "Nugget2D":
        from nugget2d.model import Nugget2D

        return Nugget2D
    raise AttributeError(f"module 'nugget2d' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
