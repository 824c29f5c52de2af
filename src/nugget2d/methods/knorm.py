"""KNorm: each head keeps the tokens whose keys have the lowest norms (arXiv 2406.11430)."""

from typing import ClassVar

from nugget2d.methods.whole_context import Context, Kept, WholeContextMethod, highest


class KNorm(WholeContextMethod):
    """Keys of low norm get the most attention in many LMs (section 3 of the paper); the prefill is the only pass."""

    name: ClassVar[str] = "knorm"
    source: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430"

    def select(self, context: Context, count: int) -> Kept:
        """Per layer and head, the same number everywhere."""
        return [highest(-keys.float().norm(dim=-1), count) for keys in context.keys]
