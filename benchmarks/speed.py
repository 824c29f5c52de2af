"""What compression costs and saves in time, all in one run.

    python benchmarks/speed.py --data ../shared/data/lm/enwiki2015.val.jsonl.xz --out benchmarks/results/speed.json

For contexts of several lengths: `compress` against a plain prefill of the same text (both from the string), and greedy
decoding with the memory against decoding with the full cache. Each pair is timed alternately; figures are medians, and
only the ratios mean much on a shared machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from nugget2d import Nugget2D
from nugget2d.cache import Nuggets
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.reading import text_nuggets
from nugget2d.segmentation import detokenize
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
    results = []
    for length in options.lengths:
        context = detokenize(model.tokenizer, ids[:length].tolist())
        results.append(measure(model, context, options.ratio, options.new_tokens, options.repeats))
    keys = list(results[0])
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    write_report(options.out, {"model": options.model, "ratio": options.ratio, "results": results})


@torch.no_grad()
def measure(model: Nugget2D, context: str, ratio: float, new_tokens: int, repeats: int) -> dict[str, Any]:
    """All figures for one context."""
    memory = model.compress(context, ratio=ratio)
    prefilled = prefill(model, context)
    full = Nuggets([layer.keys for layer in prefilled.layers], [layer.values for layer in prefilled.layers])
    compact, _ = text_nuggets(model, memory)
    tokens = full.count
    compress_s, prefill_s = alternate(
        lambda: model.compress(context, ratio=ratio), lambda: prefill(model, context), repeats
    )
    memory_s, full_s = alternate(
        lambda: decode(model, compact, tokens, new_tokens), lambda: decode(model, full, tokens, new_tokens), repeats
    )
    return {
        "tokens": tokens,
        "nuggets": memory.num_nuggets,
        "prefill_ms": round(1000 * prefill_s, 2),
        "compress_ms": round(1000 * compress_s, 2),
        "compress_over_prefill": round(compress_s / prefill_s, 3),
        "full_tokens_per_s": round(new_tokens / full_s, 1),
        "memory_tokens_per_s": round(new_tokens / memory_s, 1),
        "decode_speedup": round(full_s / memory_s, 3),
        "full_cache_bytes": memory.full_nbytes,
        "memory_bytes": memory.nbytes,
    }


def prefill(model: Nugget2D, context: str) -> DynamicCache:
    """What an LM does with a prompt: tokenize, one pass, the logits of the last token."""
    cache = DynamicCache(config=model.lm.config)
    model.lm(input_ids=model.ids(context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode(model: Nugget2D, nuggets: Nuggets, position: int, steps: int) -> None:
    """Greedy decoding of `steps` tokens after a cache, one at a time."""
    cache = nuggets.to_cache(model.lm.config)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    for step in range(steps):
        positions = torch.full_like(token, position + step)
        logits = model.lm(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    if token.is_cuda:
        torch.cuda.synchronize()


def alternate(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of two calls, timed in turns after a warm-up of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
