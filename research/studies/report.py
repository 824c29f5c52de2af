"""A study's results as JSON, as a table and as a picture."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.files import atomic_write
from research.studies.study import Study

# metric -> (column, factor, digits)
COLUMNS = {
    "accuracy_4x": ("4x %", 100, 1),
    "accuracy_10x": ("10x %", 100, 1),
    "accuracy_20x": ("20x %", 100, 1),
    "accuracy_40x": ("40x %", 100, 1),
    "continue_none": ("next, shown nothing", 1, 3),
    "continue_10x": ("next, nuggets 10x", 1, 3),
    "continue_full": ("next, shown all", 1, 3),
    "lm_loss": ("LM", 1, 3),
}
CHARTED, PROFILE = "accuracy_20x", "profile_20x"
NOTE = """\
Teacher-forced token accuracy on held-out windows (k = ceil(n / ratio) nuggets); "next" and "LM": nats per token of what
follows a window, and of plain language modelling. Mean over seeds, and (lowest .. highest)."""


def write_study(out: Path, path: Path, study: Study, results: list[dict[str, Any]]) -> None:
    """Write study.json, study.md and study.png into `out`, from the results of the variants that are done."""
    variants: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        variants[result["variant"]].append(result)
    summary = {
        name: {
            "seeds": [run["seed"] for run in runs],
            "mean": {key: round(mean(run["metrics"][key] for run in runs), 4) for key in COLUMNS},
            PROFILE: _profile(runs),
        }
        for name, runs in variants.items()
    }
    text = path.read_text(encoding="utf-8")
    write_report(out / "study.json", {"study": path.stem, "text": text, "summary": summary, "runs": results})
    expected = len(study.variants) * len(study.seeds)
    missing = "" if len(results) == expected else f"\n\n{len(results)} of {expected} runs are done."
    table = markdown_table(
        ["variant", "seeds", "parameters", "tokens", "minutes", *(name for name, _, _ in COLUMNS.values())],
        [_row(name, runs) for name, runs in variants.items()],
    )
    profiles = "\n".join(
        f"- {name}: {' '.join(f'{100 * share:.0f}' for share in one[PROFILE])}" for name, one in summary.items()
    )
    page = (
        f"# {path.stem}\n\n{study.question}\n\n{NOTE}{missing}\n\n{table}\n\n"
        f"Accuracy (%) at 20x by distance from a token to its nugget:\n\n{profiles}\n"
    )
    with atomic_write(out / "study.md") as file:
        file.write(page.encode())
    _plot(out / "study.png", f"{path.stem}: {study.question}", variants, summary)


def _row(name: str, runs: list[dict[str, Any]]) -> list[Any]:
    minutes = mean(run["seconds"] for run in runs) / 60
    cells = [name, len(runs), f"{runs[0]['parameters']:,}", f"{runs[0]['tokens']:,}", f"{minutes:.1f}"]
    for key, (_, factor, digits) in COLUMNS.items():
        values = [run["metrics"][key] * factor for run in runs]
        spread = f" ({min(values):.{digits}f} .. {max(values):.{digits}f})" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}")
    return cells


def _profile(runs: list[dict[str, Any]]) -> list[float]:
    """Mean over seeds, as far as every seed's windows reach (a policy may leave gaps of different width)."""
    return [round(mean(shares), 4) for shares in zip(*(run["metrics"][PROFILE] for run in runs), strict=False)]


def _plot(
    picture: Path, title: str, variants: dict[str, list[dict[str, Any]]], summary: dict[str, dict[str, Any]]
) -> None:
    """Left: accuracy at 20x, a bar for the mean and a dot for each seed. Right: the profile of each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8 + 0.35 * max(6, len(variants))), layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True)
    bars, lines = figure.subplots(1, 2)
    for place, (name, runs) in enumerate(variants.items()):
        colour = f"C{place % 10}"
        bars.barh(place, 100 * summary[name]["mean"][CHARTED], color=colour, alpha=0.5)
        bars.plot([100 * run["metrics"][CHARTED] for run in runs], [place] * len(runs), "o", color=colour, ms=4)
        lines.plot([100 * share for share in summary[name][PROFILE]], "-", color=colour, lw=1.2, label=name)
    bars.set(yticks=range(len(variants)), yticklabels=list(variants), xlim=(0, 100), xlabel="token accuracy at 20x, %")
    bars.invert_yaxis()
    lines.set(xlabel="tokens from a token to its nugget", ylabel="accuracy, %", ylim=(0, 100), xlim=(0, 24))
    lines.legend(fontsize=7)
    for axes in (bars, lines):
        axes.grid(alpha=0.3)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)
