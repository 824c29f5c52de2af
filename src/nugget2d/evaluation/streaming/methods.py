"""The methods that are compared, by name."""

from nugget2d.config import SelectionName
from nugget2d.evaluation.streaming.full import Full, equal_text
from nugget2d.evaluation.streaming.nuggets import Compressed
from nugget2d.evaluation.streaming.reader import Budget, Reader
from nugget2d.evaluation.streaming.sinks import Sinks
from nugget2d.modeling.network import Network

OURS, COMPRESSIVE = "nugget2d", "compressive"
SELECTIONS: tuple[SelectionName, ...] = ("even", "random", "learned")


def readers(model: Network, pooled: Network | None, budget: Budget) -> dict[str, Reader]:
    """Every method within `budget`, by name; the first is the reference."""
    found: dict[str, Reader] = {OURS: Compressed(model, budget)}
    for selection in SELECTIONS:
        if selection != model.config.selection:
            found[f"{OURS}, {selection}"] = Compressed(model, budget, selection)
    found["full"] = Full(model, budget.states, budget.chunk)
    found["streaming-llm"] = Sinks(model, budget.states, budget.chunk)
    if pooled is not None:
        found[COMPRESSIVE] = Compressed(pooled, budget)
    found["full, equal text"] = equal_text(model, budget.text, budget.chunk)
    return found
