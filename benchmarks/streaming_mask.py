"""What it costs to train on streams: chunks that gather their keys against one dense mask, side by side.

    python benchmarks/streaming_mask.py --out benchmarks/results/streaming_mask.json

A forward and a backward pass of the decoder over one text, timed alternately; numbers are medians, and only the ratios
mean much on a shared machine. What the ways share, the output projection and the loss, is timed alone: the factors are
of the rest, the layers. On CUDA also FlexAttention.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.inference.placement import join_rows
from nugget2d.modeling.losses import token_losses
from nugget2d.streaming.layout import Layout
from nugget2d.streaming.parallel import Way, mixed_logits


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 31], help="lengths of text, in chunks")
    parser.add_argument("--recent-window", type=int, default=128)
    parser.add_argument("--ratio", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Nugget2D.from_pretrained(options.model, device=device)
    ways = [way for way in get_args(Way) if way != "flex" or device == "cuda"]
    results = []
    for steps in options.steps:
        layout = Layout(options.recent_window, model.config.window, steps)
        results.append(measure(model, layout, max(1, layout.chunk // options.ratio), ways, options.repeats))
        print(results[-1], flush=True)
    keys = list(results[0])
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    settings = {"model": options.model, "tau": options.recent_window, "ratio": options.ratio}
    write_report(options.out, {**settings, "results": results})


def measure(model: Nugget2D, layout: Layout, count: int, ways: list[Way], repeats: int) -> dict[str, Any]:
    """Seconds of a pass over one text of random tokens, by each way."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.tokenizer), (1, layout.length), generator=generator).to(model.device)
    rows = ids[0, : layout.segments * layout.chunk].view(layout.segments, layout.chunk)
    with torch.no_grad():
        encoded = model.encode(rows, [layout.chunk] * len(rows), [count] * len(rows))
    nuggets = join_rows(model, encoded.nuggets, 1, layout.segments, layout.chunk)
    head = cast(nn.Module, model.lm.get_output_embeddings())
    hidden = torch.randn(1, layout.length, model.lm.config.hidden_size, device=model.device, requires_grad=True)
    passes: dict[str, Callable[[], Tensor]] = {"head": lambda: head(hidden)}
    for way in ways:
        passes[way] = partial(mixed_logits, model, nuggets, ids, layout, way)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(repeats + 1):
        for name, logits in passes.items():
            start = time.perf_counter()
            token_losses(logits()[:, :-1], ids[:, 1:]).mean().backward()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
            model.zero_grad()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    layers = {way: medians[way] - medians["head"] for way in ways}
    return {
        "tokens": layout.length,
        "nuggets": nuggets.count,
        **{f"{name}_s": round(median, 3) for name, median in medians.items()},
        **{f"dense_over_{way}": round(layers["dense"] / layers[way], 2) for way in ways if way != "dense"},
    }


if __name__ == "__main__":
    main()
