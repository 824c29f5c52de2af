r"""How far gradient steps on the nuggets of one text go, and what they cost.

    python benchmarks/refinement.py --data ../shared/data/lm/enwiki2015.val.jsonl.xz \
        --out benchmarks/results/refinement.json

For every ratio and number of steps: greedy BLEU and token accuracy of windows, seconds for each of them (all windows
together), and what the memory is worth for the 64 tokens that follow. Ratios of 100 and more get windows of twice the
length, if the model takes so many tokens in one segment; a segment has at least one nugget, so the table tells what was
achieved. A picture lies beside the JSON.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from nugget2d import Nugget2D
from nugget2d.evaluation.continuation import memory_losses
from nugget2d.evaluation.distortion import Reference, measure_reference
from nugget2d.evaluation.fidelity import bleu
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.evaluation.windows import Window, sample_windows
from nugget2d.files import atomic_write
from nugget2d.text.segmentation import tokenize
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source

CONTINUATION = 64  # tokens
LONG_FROM = 100  # ratios from here on get windows of twice the length


def main() -> None:
    """Measure, print a table, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True, help=".txt, .jsonl or .jsonl.xz with one article a record")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="+", default=[20, 50, 100, 200])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 10, 25, 50, 100, 200, 400])
    options = parser.parse_args()

    model = Nugget2D.from_pretrained(options.model, device="cuda" if torch.cuda.is_available() else "cpu")
    texts = documents(Source(path=options.data.name), options.data.parent)
    ids = [tokenize(model.tokenizer, text)[0] for text in texts]
    results = []
    for ratio in options.ratios:
        length = min(options.length * (2 if ratio >= LONG_FROM else 1), model.config.window)
        windows = sample_windows(model.tokenizer, ids, options.windows, length, target=CONTINUATION)
        reference = measure_reference(model, windows)
        for steps in options.steps:
            results.append(measure(model, windows, reference, ratio, steps))
            print(results[-1], flush=True)
    keys = list(results[0])
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    write_report(options.out, {"model": options.model, "windows": options.windows, "results": results})
    draw(results, options.out.with_suffix(".png"))


def measure(
    model: Nugget2D, windows: Sequence[Window], reference: Reference, ratio: float, steps: int
) -> dict[str, Any]:
    """All metrics of one ratio and number of steps; exact mode makes accuracy known at 0 steps too."""
    texts = [window.text for window in windows]
    targets = torch.tensor([window.target for window in windows])
    start = time.perf_counter()
    memories = model.compress(texts, ratio=ratio, optimize_steps=steps, exact=True)
    seconds = time.perf_counter() - start
    greedy = model.reconstruct([replace(memory, exact=None) for memory in memories])
    tokens, nuggets = (sum(getattr(memory, name) for memory in memories) for name in ("num_tokens", "num_nuggets"))
    nll = {
        "nll_none": reference.none,
        "nll_no_memory": reference.no_memory,
        "nll_memory": memory_losses(model, memories, targets),
        "nll_full": reference.full,
    }
    none, memory, full = (float(nll[key].mean()) for key in ("nll_none", "nll_memory", "nll_full"))
    return {
        "ratio": ratio,
        "achieved": round(tokens / nuggets, 2),
        "tokens": len(windows[0].ids),
        "steps": steps,
        "seconds_each": round(seconds / len(windows), 3),
        "bleu": round(bleu(greedy, texts), 2),
        "accuracy": round(sum((m.accuracy or 0) * m.num_tokens for m in memories) / tokens, 4),
        "exact_windows": round(sum(a == b for a, b in zip(greedy, texts, strict=True)) / len(windows), 3),
        **{key: round(float(losses.mean()), 4) for key, losses in nll.items()},
        "retained": round((none - memory) / (none - full), 3),
    }


def draw(results: Sequence[dict[str, Any]], picture: Path) -> None:
    """Accuracy and what continuation retains against time, one line per ratio, into `picture` (PNG)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    quality, worth = figure.subplots(1, 2)
    for ratio in dict.fromkeys(result["ratio"] for result in results):
        rows = [result for result in results if result["ratio"] == ratio]
        label = f"{rows[0]['achieved']:g}x ({rows[0]['tokens']} tokens)"
        seconds = [row["seconds_each"] for row in rows]
        quality.plot(seconds, [row["bleu"] for row in rows], "o-", ms=3, label=label)
        worth.plot([row["steps"] for row in rows], [row["nll_memory"] for row in rows], "o-", ms=3, label=label)
    worth.axhline(
        results[0]["nll_no_memory"], color="grey", lw=1, ls=":", label=f"no memory, {results[0]['tokens']} tokens"
    )
    quality.set(xscale="log", xlabel="seconds a window", ylabel="greedy BLEU", ylim=(0, 102))
    worth.set(xlabel="steps", ylabel=f"nats a token, next {CONTINUATION} tokens")
    for axes in (quality, worth):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main()
