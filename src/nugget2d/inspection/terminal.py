"""An inspection in terminal colours."""

from rich.console import Console
from rich.text import Text

from nugget2d.inspection.marks import LEVELS, Inspection
from nugget2d.text.visible import visible

# black on pale yellow to deep orange: readable on light and dark terminals
_STYLES = [f"black on {colour}" for colour in ("#fff3cd", "#ffe08a", "#ffc94a", "#ffab1f", "#ff8a00")]


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print metrics, a legend and the text with its nuggets; without colours they are between ⟦ and ⟧."""
    coloured = console.color_system is not None
    console.print(_metrics(inspection), soft_wrap=True)
    console.print(_legend(coloured), soft_wrap=True)
    body = Text()
    for run in inspection.runs:
        shown = visible(run.text, marked=run.mark is not None)
        if run.mark is None:
            body.append(shown)
        elif coloured:
            body.append(shown, _STYLES[run.mark.level - 1])
        else:
            body.append(f"⟦{shown}⟧")
    console.print("")
    console.print(body, soft_wrap=True)


def _metrics(inspection: Inspection) -> Text:
    return Text(
        f"{inspection.num_tokens:,} tokens, {inspection.num_nuggets:,} nuggets, ratio {inspection.ratio:.2f}, "
        f"{inspection.nbytes:,} of {inspection.full_nbytes:,} bytes, model {visible(inspection.model, marked=False)}"
        + ("" if inspection.accuracy is None else f", measured accuracy {inspection.accuracy:.4f}")
        + (", text as reconstructed by the model" if inspection.reconstructed else "")
    )


def _legend(coloured: bool) -> Text:
    if not coloured:
        return Text("nuggets are between ⟦ and ⟧", style="dim")
    shades = [(f" {level} ", _STYLES[level - 1]) for level in range(1, LEVELS + 1)]
    return Text.assemble(("nuggets by score: lowest fifth ", "dim"), *shades, (" highest fifth", "dim"))
