"""Reconstruction quality over ratios, on windows of held-out articles.

python benchmarks/quality.py --data ../shared/data/lm/enwiki2015.val.jsonl.xz --out benchmarks/results/quality.json
"""

import argparse
from pathlib import Path

from rich.progress import track

from nugget2d import Nugget2D
from nugget2d.evaluation.fidelity import measure_fidelity, sample_windows
from nugget2d.evaluation.report import markdown_table, write_report
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
    write_report(
        options.out,
        {"model": options.model, "length": options.length, "chars_per_token": round(characters, 3), "results": results},
    )


if __name__ == "__main__":
    main()
