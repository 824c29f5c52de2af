"""The loss of a run as a picture."""

import json
from pathlib import Path

from nugget2d.files import atomic_write


def plot_log(log: Path, picture: Path) -> None:
    """Draw training loss (smoothed) and held-out figures of `log` over tokens into `picture` (PNG).

    Does nothing without matplotlib, which only the extra `eval` installs: a run must not fail at its end for a picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not records:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tokens = [record["tokens"] / 1e6 for record in records]
    axes.plot(tokens, [record["loss"] for record in records], color="0.85", linewidth=0.7)
    axes.plot(tokens, _smooth([record["loss"] for record in records]), color="C0", label="training loss")
    axes.set(xlabel="million tokens", ylabel="nats per token", title=log.parent.name)
    held_out = [(record["tokens"] / 1e6, record["held_out"]) for record in records if "held_out" in record]
    if held_out:
        other = axes.twinx()
        other.set_ylabel("held-out figures")
        for number, key in enumerate(key for key, value in held_out[0][1].items() if isinstance(value, float)):
            other.plot(
                [x for x, _ in held_out], [f[key] for _, f in held_out], "o-", ms=3, color=f"C{number + 1}", label=key
            )
        other.legend(loc="center right", fontsize=8)
    axes.legend(loc="upper right", fontsize=8)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def _smooth(values: list[float], weight: float = 0.98) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed
