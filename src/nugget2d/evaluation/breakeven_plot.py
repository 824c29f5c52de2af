"""Plots a break-even report."""

from pathlib import Path
from typing import Any

from nugget2d.evaluation.breakeven_tables import WAYS
from nugget2d.evaluation.plots import COLOURS, DPI, panels
from nugget2d.files import atomic_write

SHORTEST_AXIS = 8  # questions


def plot_breakeven(report: dict[str, Any], path: Path) -> None:
    """Write a PNG with one panel a context: total seconds against questions, one line each way.

    A band is from the lowest to the highest round.
    """
    contexts = report["contexts"]
    figure, drawn = panels(len(contexts))
    for axes, context in zip(drawn, contexts, strict=True):
        ends = [end for way in context["pays"].values() for end in way.values() if end is not None]
        questions = (0, max([SHORTEST_AXIS, *(2 * end for end in ends)]))  # straight lines need two points
        for colour, (way, name) in zip(COLOURS, WAYS.items(), strict=False):
            once, each = (context["seconds"][key][way] for key in ("once", "question"))
            low, middle, high = (
                [once[end] + number * each[end] for number in questions] for end in ("low", "median", "high")
            )
            axes.plot(questions, middle, color=colour, label=name)
            axes.fill_between(questions, low, high, color=colour, alpha=0.15, lw=0)
        star = "*" if context["beyond_context"] else ""
        axes.set(
            title=f"{context['tokens']:,}{star} tokens", xlabel="questions", ylabel="seconds in all", ylim=(0, None)
        )
        axes.margins(x=0)
    drawn[0].legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
