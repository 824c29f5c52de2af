"""Plots of reports."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nugget2d.evaluation.distortion_tables import nearest_to_profile_ratio
from nugget2d.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cell = dict[str, Any]
Report = dict[str, Any]

# Okabe and Ito's palette: told apart with any colour vision, and by marker in print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
DPI = 120


def plot_distortion(report: Report, folder: Path) -> list[Path]:
    """Write PNGs into `folder`: fidelity, bits, what continuation retains, and the copy-span profile."""
    drawings: dict[str, Callable[[Report], Figure]] = {
        "fidelity": _fidelity,
        "bits": _bits,
        "retained": _retained,
        "profile": _profile,
    }
    paths = []
    for name, draw in drawings.items():
        paths.append(folder / f"distortion-{name}.png")
        with atomic_write(paths[-1]) as file:
            draw(report).savefig(file, format="png", dpi=DPI)
    return paths


def plot_streams(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write one PNG: nats, time and bytes by position, a line for each way to read."""
    figure, axes_of = panels(3)
    labels = {"nats": "nats per token", "ms_per_token": "milliseconds per token", "bytes": "bytes held"}
    for axes, (key, label) in zip(axes_of, labels.items(), strict=True):
        for number, (name, points) in enumerate(results.items()):
            style = _style(number, name) | {"ms": 3}
            axes.plot([point["position"] for point in points], [point[key] for point in points], **style)
        axes.set(xlabel="tokens read", ylabel=label)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if key != "nats":
            axes.set_yscale("log")
    axes_of[0].legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def _fidelity(report: Report) -> "Figure":
    figure, (bleu, accuracy) = panels(2)
    for cells, style in _lines(report):
        _line(bleu, cells, "bleu", style)
        _line(accuracy, cells, "token_accuracy", style, scale=100)
    bleu.set(ylabel="BLEU of greedy reconstruction", ylim=(0, 102))
    accuracy.set(ylabel="token accuracy, teacher-forced (%)", ylim=(0, 102))
    for axes in (bleu, accuracy):
        _ratio_axis(axes, report)
    bleu.legend(title="window")
    return figure


def _bits(report: Report) -> "Figure":
    from matplotlib.ticker import LogLocator

    figure, (patch, file) = panels(2)
    for cells, style in _lines(report):
        ratios = [cell["achieved_ratio"] for cell in cells]
        patch.plot(ratios, [cell["patch_bits_per_char"] for cell in cells], **style)
        file.plot(ratios, [cell["exact_file_bits_per_char"] for cell in cells], **style)
    longest = report["lengths"][-1]
    for axes in (patch, file):
        for name, dashes in (("xz", "--"), ("zstd", ":")):
            label = f"{name}, all windows of {longest['length']} tokens as one stream"
            axes.axhline(longest["coder_bits_per_char"][f"{name}_stream"], color="0.35", ls=dashes, lw=1.2, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        _ratio_axis(axes, report)
    patch.set(ylabel="bits a character", title="patch of exact mode")
    file.set(ylabel="bits a character", title="whole file of an exact int8 memory")
    file.legend(fontsize=8)
    return figure


def _retained(report: Report) -> "Figure":
    figure, (axes,) = panels(1)
    for (cells, style), reference in zip(_lines(report), report["lengths"], strict=True):
        meaningful = [cell for cell in cells if cell["retained"] is not None]
        if meaningful:
            _line(axes, meaningful, "retained", style, scale=100)
            dashed = {**style, "ls": "--", "lw": 1, "ms": 3, "label": None}
            _line(axes, meaningful, "truncation_retained", dashed, scale=100, band=False)
            axes.axhline(100 * reference["no_memory_retained"]["value"], color=style["color"], ls=":", lw=1.2)
    axes.axhline(0, color="0.35", lw=0.8)
    _ratio_axis(axes, report)
    axes.set(ylabel="retained information (%)\n0: as after nothing, 100: as after the whole window")
    if axes.get_legend_handles_labels()[0]:
        for dashes, label in (("-", "memory"), ("--", "last k tokens as text"), (":", "decoder without memory")):
            axes.plot([], [], color="0.35", ls=dashes, label=label)
        axes.legend(ncols=2)
    else:
        message = "the whole window does not help this model significantly"
        axes.text(0.5, 0.5, message, ha="center", transform=axes.transAxes)
    return figure


def _profile(report: Report) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = panels(1)
    chosen = nearest_to_profile_ratio(report["cells"])
    for number, cell in enumerate(chosen):
        values = [100 * value for value in cell["copy_span_profile"]]
        axes.plot(range(len(values)), values, **_style(number, f"{cell['length']} tokens"))
    axes.set(
        xlabel="tokens from a token to the nugget that follows it",
        ylabel="token accuracy, teacher-forced (%)",
        title=f"copy span at {chosen[0]['ratio']:g}x",
        ylim=(0, 102),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="window")
    return figure


def panels(count: int) -> "tuple[Figure, Sequence[Axes]]":
    """A figure of `count` panels in a row, with grids."""
    # the object-oriented interface draws with Agg and touches no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * count if count > 1 else 8, 4.8), layout="constrained")
    drawn = figure.subplots(1, count, squeeze=False)[0]
    for axes in drawn:
        axes.grid(alpha=0.3)
    return figure, drawn


def _lines(report: Report) -> list[tuple[list[Cell], dict[str, Any]]]:
    """The cells of each length, and how to draw them."""
    lengths = [entry["length"] for entry in report["lengths"]]
    return [
        ([cell for cell in report["cells"] if cell["length"] == length], _style(number, f"{length} tokens"))
        for number, length in enumerate(lengths)
    ]


def _style(number: int, label: str) -> dict[str, Any]:
    kind = number % len(COLOURS)
    return {"color": COLOURS[kind], "marker": _MARKERS[kind], "ms": 5, "label": label}


def _line(
    axes: "Axes", cells: list[Cell], key: str, style: dict[str, Any], *, scale: float = 1, band: bool = True
) -> None:
    """A metric against the achieved ratio, with its interval as a band."""
    ratios = [cell["achieved_ratio"] for cell in cells]
    axes.plot(ratios, [scale * cell[key]["value"] for cell in cells], **style)
    if band and all(cell[key]["low"] is not None for cell in cells):
        low, high = ([scale * cell[key][bound] for cell in cells] for bound in ("low", "high"))
        axes.fill_between(ratios, low, high, color=style["color"], alpha=0.15, lw=0)


def _ratio_axis(axes: "Axes", report: Report) -> None:
    """Ratios a factor of two apart are equally far apart; ticks where they were asked."""
    ratios = sorted({cell["ratio"] for cell in report["cells"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("tokens a nugget")
