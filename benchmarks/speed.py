"""What compression costs and saves in time, all in one run.

    python benchmarks/speed.py --data ../shared/data/lm/enwiki2015.val.jsonl.xz --out benchmarks/results/speed.json

What `nugget2d bench breakeven` measures, as ratios: `compress` against a plain prefill of the same text (both from the
string), and greedy decoding with the memory, all of it, against decoding with the full cache. Everything is timed in
turns; metrics are medians, and only the ratios mean much on a shared machine.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nugget2d import Nugget2D
from nugget2d.evaluation.breakeven import Plan, device_clock, measure_context
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.text.segmentation import detokenize
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--ratio", type=float, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    model = Nugget2D.from_pretrained(options.model, device="cuda" if torch.cuda.is_available() else "cpu")
    text = "\n".join(documents(Source(path=options.data.name, max_chars=200_000), options.data.parent))
    ids = model.ids(text)[0]
    plan = Plan(ratio=options.ratio, answer=options.new_tokens, runs=options.repeats)
    results = []
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "context.nugget"
        for length in options.lengths:
            context = detokenize(model.tokenizer, ids[:length].tolist())
            measured = measure_context(model, context, ids[None, :1], plan, file, device_clock(model.device))
            results.append(ratios(measured, plan))
    keys = list(results[0])
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    write_report(options.out, {"model": options.model, "ratio": options.ratio, "results": results})


def ratios(measured: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """All metrics of one context."""
    seconds = measured["seconds"]
    prefill, compress = seconds["once"]["cache"]["median"], seconds["compress"]["median"]
    full, memory = (
        (plan.answer - 1) / (seconds["question"][way]["median"] - seconds["first_token"][way]["median"])
        for way in ("cache", "memory")
    )
    return {
        "tokens": measured["tokens"],
        "nuggets": measured["nuggets"],
        "prefill_ms": round(1000 * prefill, 2),
        "compress_ms": round(1000 * compress, 2),
        "compress_over_prefill": round(compress / prefill, 3),
        "full_tokens_per_s": round(full, 1),
        "memory_tokens_per_s": round(memory, 1),
        "decode_speedup": round(memory / full, 3),
        "full_cache_bytes": measured["bytes"]["cache"],
        "memory_file_bytes": measured["bytes"]["memory"],
    }


if __name__ == "__main__":
    main()
