"""An inspection as one self-contained HTML page without scripts."""

from html import escape
from importlib import resources
from string import Template

from nugget2d.inspection.marks import LEVELS, Inspection, Nugget, Run
from nugget2d.text.visible import visible


def to_html(inspection: Inspection) -> str:
    """The page: metrics, legend, the text with its nuggets (details on hover), and a table of all of them."""
    template = Template((resources.files("nugget2d") / "inspection" / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        model=escape(inspection.model),
        metrics="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _metrics(inspection)),
        note=_note(inspection),
        legend=_legend(),
        text="".join(map(_run, inspection.runs)),
        rows="\n".join(_row(run, nugget) for run in inspection.runs if run.mark for nugget in run.mark.nuggets),
    )


def _metrics(inspection: Inspection) -> list[tuple[str, str]]:
    accuracy = [] if inspection.accuracy is None else [("Measured accuracy", f"{inspection.accuracy:.4f}")]
    return [
        ("Tokens", f"{inspection.num_tokens:,}"),
        ("Nuggets", f"{inspection.num_nuggets:,}"),
        ("Ratio", f"{inspection.ratio:.2f}"),
        *accuracy,
        ("Memory", f"{inspection.nbytes:,} bytes"),
        ("Full KV cache", f"{inspection.full_nbytes:,} bytes"),
        ("Model", escape(inspection.model)),
    ]


def _note(inspection: Inspection) -> str:
    if inspection.reconstructed:
        return "The memory does not hold its text: this is the text as the model reconstructs it."
    return "This is the source text."


def _legend() -> str:
    shades = "".join(f'<mark class="n{level}">{level}</mark>' for level in range(1, LEVELS + 1))
    return f"<span>lowest fifth of the scores</span> {shades} <span>highest fifth</span>"


def _run(run: Run) -> str:
    shown = escape(visible(run.text, marked=run.mark is not None))
    if run.mark is None:
        return shown
    title = escape("; ".join(map(_details, run.mark.nuggets)))
    return f'<mark class="n{run.mark.level}" title="{title}">{shown}</mark>'


def _details(nugget: Nugget) -> str:
    start, end = nugget.span
    return f"token {nugget.position}, score {nugget.score:.3f} (rank {nugget.rank}), characters {start} to {end}"


def _row(run: Run, nugget: Nugget) -> str:
    start, end = nugget.span
    values = (nugget.position, f"{nugget.score:.3f}", nugget.rank, f"{start}\u2013{end}")
    cells = "".join(f"<td>{value}</td>" for value in values)
    return f"<tr><td><code>{escape(visible(run.text, marked=True))}</code></td>{cells}</tr>"
