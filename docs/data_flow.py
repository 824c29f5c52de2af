"""Draws docs/data-flow.png, the figure of the README: from a text to an answer, with a selection that a method made.

python docs/data_flow.py --model SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from nugget2d import Memory, Nugget2D

SHOWN = 120  # tokens of the context
INK, KEPT, BOX = "#22313f", "#1f6f8b", "#eef3f6"


def kept(memory: Memory, length: int) -> np.ndarray:
    """(layers * kv_heads, length) bool: which of the first tokens each head keeps."""
    payload = memory.kv
    heads = [rows for layer in range(len(payload.keys)) for rows in payload.rows_of(layer)]
    cells = np.zeros((len(heads), length), dtype=bool)
    for row, head in enumerate(heads):
        positions = payload.local_positions[head.long()].numpy()
        cells[row, positions[positions < length]] = True
    return cells


def draw(memory: Memory, path: Path) -> None:
    """The whole figure, as PNG."""
    figure, axes = plt.subplots(figsize=(10, 2.6), dpi=110)
    axes.set(xlim=(0, 100), ylim=(3, 30))
    axes.axis("off")
    layers, heads = len(memory.kv.keys), memory.kv.num_kv_heads
    mebibytes, full = memory.nbytes / 2**20, memory.full_nbytes / 2**20
    box(axes, 0, 12, f"text\n{memory.num_tokens:,} tokens")
    box(axes, 15, 15, f"prefill\none pass of the LM\n{layers} layers,\n{heads} KV heads each")
    inner = axes.inset_axes((0.355, 0.11, 0.25, 0.67))
    inner.imshow(kept(memory, SHOWN), aspect="auto", cmap=matplotlib.colors.ListedColormap(["#dfe7ec", KEPT]))
    inner.set(xticks=[], yticks=[])
    inner.set_xlabel(f"the first {SHOWN} tokens", fontsize=8, color=INK)
    inner.set_ylabel("layers x heads", fontsize=8, color=INK)
    title = f"selection per head ({memory.method.name}, {memory.ratio:.0f}x)\ndark: keys and values that are kept"
    axes.text(48, 27.5, title, ha="center", va="center", fontsize=8, color=INK)
    box(axes, 64, 17, f"memory file\n{memory.dtype} states, {mebibytes:.1f} MiB\n(full cache: {full:.1f} MiB)")
    box(axes, 85, 15, "reader\nthe same LM\nanswers from\nthe memory")
    for start, end in ((12, 15), (30, 33), (60.5, 64), (81, 85)):
        axes.annotate("", (end, 15), (start, 15), arrowprops={"arrowstyle": "-|>", "color": INK})
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05)


def box(axes: Any, left: float, width: float, text: str) -> None:
    """A step: its name, and a line or two about it."""
    name, _, more = text.partition("\n")
    axes.add_patch(plt.Rectangle((left, 6), width, 18, facecolor=BOX, edgecolor=INK, linewidth=1, clip_on=False))
    axes.text(left + width / 2, 20, name, ha="center", va="center", fontsize=10, weight="bold", color=INK)
    axes.text(left + width / 2, 12.5, more, ha="center", va="center", fontsize=7.5, color=INK)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    options = parser.parse_args()
    document = (files("nugget2d") / "cli" / "demo.txt").read_text(encoding="utf-8")
    made = Nugget2D.from_pretrained(options.model).compress(document, method="knorm", ratio=5, dtype="int8")
    draw(made, Path(__file__).with_name("data-flow.png"))
