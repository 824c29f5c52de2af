"""Plots the log of a training run."""

import json
from pathlib import Path
from typing import Any

from nugget2d.files import atomic_write


def plot_log(log: Path, picture: Path) -> None:
    """Draw `log` into `picture` (PNG): above, losses of every objective and on held-out text; below, accuracies.

    Does nothing without matplotlib, which only the extra `eval` installs: a run must not fail at its end for a picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not records:
        return
    objectives = sorted({key for record in records for key in record if key.startswith("loss_")}) or ["loss"]
    held_out = [record for record in records if "held_out" in record]
    metrics = [key for key, value in held_out[0]["held_out"].items() if isinstance(value, float)] if held_out else []
    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    for key in objectives:
        tokens, values = _series(records, key)
        losses.plot(tokens, _smooth(values), label=f"training, {key.removeprefix('loss_')}")
    for key in metrics:
        axes, style = (accuracies, "o-") if key.startswith("accuracy") else (losses, "o:")
        values = [record["held_out"][key] for record in held_out]
        label = key.replace("_", " ")
        axes.plot(_tokens(held_out), values, style, ms=3, lw=1, label=f"held out, {label}")
    losses.set(ylabel="nats per token", title=log.parent.name, ylim=(0, None))
    accuracies.set(ylabel="token accuracy", xlabel="million tokens", ylim=(0, 1))
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def _tokens(records: list[dict[str, Any]]) -> list[float]:
    return [record["tokens"] / 1e6 for record in records]


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    with_key = [record for record in records if key in record]
    return _tokens(with_key), [record[key] for record in with_key]


def _smooth(values: list[float], weight: float = 0.98) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed
