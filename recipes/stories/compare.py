"""LoRA against copies: reports of `nugget2d bench distortion` side by side, and what plain guessing gets.

    python recipes/stories/compare.py benchmarks/results/stories/lora/distortion.json \\
        benchmarks/results/stories/copies/distortion.json --base runs/stories/base --data runs/stories/test.jsonl \\
        --out benchmarks/results/stories/comparison.json

Token accuracy is teacher-forced, and an LM guesses many tokens from those before them alone: `guessed` is the share
that the base, shown no memory, gets of the very same windows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from nugget2d.checkpoints.base import load_base
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.evaluation.windows import sample_windows
from nugget2d.text.segmentation import tokenize
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source

FIGURES = ("token_accuracy", "bleu", "exact_windows", "nll_memory", "retained")


def main() -> None:
    """Print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    reports = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in options.reports}
    texts = list(documents(Source(path=options.data.name), options.data.parent))
    first = next(iter(reports.values()))
    counts = {entry["length"]: entry["windows"] for entry in first["lengths"]}
    target, seed = first["settings"]["target"], first["settings"]["seed"]
    guessed = {
        length: guesses(options.base, texts, windows, length, target, seed) for length, windows in counts.items()
    }
    rows = [row(name, report, cell, guessed) for name, report in reports.items() for cell in report["cells"]]
    rows.sort(key=lambda row: (row["length"], row["ratio"], row["model"]))
    plain = [
        {"model": name, "length": entry["length"]}
        | {key: entry[key]["value"] for key in ("nll_none", "nll_full", "nll_no_memory")}
        for name, report in reports.items()
        for entry in report["lengths"]
    ]
    for table in (rows, plain):
        print(markdown_table(list(table[0]), [list(entry.values()) for entry in table]), end="\n\n")
    write_report(options.out, {"data": options.data.name, "cells": rows, "language_models": plain})


def row(name: str, report: dict[str, Any], cell: dict[str, Any], guessed: dict[int, float]) -> dict[str, Any]:
    """One cell of a report, without its intervals."""
    return {
        "model": name,
        "length": cell["length"],
        "ratio": cell["ratio"],
        "tokens_per_nugget": cell["achieved_ratio"],
        "guessed": guessed[cell["length"]],
        **{key: None if cell[key] is None else round(cell[key]["value"], 4) for key in FIGURES},
    }


@torch.no_grad()
def guesses(base: Path, texts: list[str], windows: int, length: int, target: int, seed: int) -> float:
    """Share of tokens that the plain LM predicts right from those before them in their window."""
    loaded = load_base(base)
    lm, tokenizer = loaded.lm, loaded.tokenizer
    ids = [tokenize(tokenizer, text)[0] for text in texts]
    chosen = sample_windows(tokenizer, ids, windows, length, target=target, seed=seed)
    rows = torch.tensor([[tokenizer.bos_token_id, *window.ids] for window in chosen])
    return round(float((lm.eval()(rows[:, :-1]).logits.argmax(-1) == rows[:, 1:]).float().mean()), 4)


if __name__ == "__main__":
    main()
