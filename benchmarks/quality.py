"""Reconstruction quality over ratios, and what a memory is worth for going on, on windows of held-out articles.

python benchmarks/quality.py --data ../shared/data/lm/enwiki2015.val.jsonl.xz --out benchmarks/results/quality.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

from nugget2d import Nugget2D
from nugget2d.evaluation.fidelity import measure_fidelity, sample_windows
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.evaluation.teacher_forced import continuation_loss, lm_loss_per_token
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True, help=".txt, .jsonl or .jsonl.xz with one article a record")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8, 10, 16, 20])
    parser.add_argument("--selections", nargs="+", default=None, help="policies; the model's own if left out")
    options = parser.parse_args()

    model = Nugget2D.from_pretrained(options.model)
    texts = list(documents(Source(path=options.data.name), options.data.parent))
    windows = sample_windows(model, texts, options.windows, options.length)
    runs = [(s, r) for s in options.selections or [model.config.selection] for r in options.ratios]
    results = [
        {"selection": selection} | measure_fidelity(model, windows, ratio, selection=selection)
        for selection, ratio in track(runs, "ratios")
    ]
    keys = ["selection", "ratio", "achieved_ratio", "chars_per_nugget", "bleu", "token_accuracy", "exact_windows"]
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    for result in results:
        print(f"{result['ratio']:g}x profile:", " ".join(f"{100 * p:.0f}" for p in result["copy_span_profile"]))
    tokens = sum(len(model.ids(text)[0]) for text in texts)
    characters = sum(map(len, texts)) / tokens
    print(f"tokenizer: {characters:.3f} characters per token over {len(texts)} texts")
    going_on = continuation(model, texts, options.windows, options.length)
    for key, value in going_on.items():
        print(f"{key}: {value}")
    write_report(
        options.out,
        {
            "model": options.model,
            "length": options.length,
            "chars_per_token": round(characters, 3),
            "results": results,
            "continuation": going_on,
        },
    )


def continuation(model: Nugget2D, texts: Sequence[str], count: int, length: int) -> dict[str, float]:
    """Nats per token of the 64 tokens after `length` others: with all, some or none of those to be seen."""
    windows = sample_windows(model, texts, count, length + 64)
    ids = torch.cat([model.ids(window) for window in windows])
    ratios = {"no context": None, "memory 20x": 20, "memory 10x": 10, "memory 4x": 4}
    losses = {f"continuation, {name}": continuation_loss(model, ids, length, r) for name, r in ratios.items()}
    losses["continuation, full context"] = lm_loss_per_token(model, ids, length)
    losses["plain language modelling"] = lm_loss_per_token(model, ids, 0)
    return {key: round(value, 4) for key, value in losses.items()}


if __name__ == "__main__":
    main()
