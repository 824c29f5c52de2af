"""A stream over a whole novel: does it stay as good, as small and as fast as at the start?

    python benchmarks/streaming.py --data ../shared/data/lm/novels100.jsonl.xz --number 2 --out benchmarks/results/novel

By position in the text: nats per token, milliseconds per token, states in the decoder's cache, nuggets and bytes held.
Side by side, block by block: a stream that keeps all nuggets, one that keeps `--max-nuggets`, and full attention (the
base LM with a growing cache) until a block of it takes `--patience` times what the first stream takes.
"""

import argparse
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nugget2d import Nugget2D
from nugget2d.evaluation.plots import plot_streams
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.files import atomic_write
from nugget2d.modeling.cache import cached_states
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.losses import token_losses
from nugget2d.streaming.stream import Stream
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source

PART = 128  # tokens that full attention reads at a time


def main() -> None:
    """Measure; write table, plot and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True, help="records with a `split` field")
    parser.add_argument("--split", default="val")
    parser.add_argument("--number", type=int, default=0, help="which novel of the split")
    parser.add_argument("--tokens", type=int, default=None, help="from its start; all if not given")
    parser.add_argument("--block", type=int, default=4_096, help="tokens of a line of the table")
    parser.add_argument("--recent-window", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=None)
    parser.add_argument("--ratio", type=float, default=10)
    parser.add_argument("--max-nuggets", type=int, default=64)
    parser.add_argument("--patience", type=float, default=10)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args()

    model = Nugget2D.from_pretrained(options.model)
    source = Source(path=options.data.name, where={"split": options.split})
    text = next(islice(documents(source, options.data.parent), options.number, None))
    ids = model.ids(text)[0, : options.tokens]
    streams = {
        "all nuggets": model.stream(options.recent_window, options.ratio, chunk=options.chunk),
        f"{options.max_nuggets} nuggets": model.stream(
            options.recent_window, options.ratio, options.max_nuggets, chunk=options.chunk
        ),
    }
    full = FullAttention(model)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in (*streams, "full attention")}
    going_on = True
    for number, block in enumerate(ids.split(options.block)):
        position = number * options.block + len(block)
        for name, stream in streams.items():
            results[name].append({"position": position} | timed(stream.append_scored, block) | held(stream))
        if going_on:
            mine = {"position": position} | timed(full.append_scored, block) | full.held()
            results["full attention"].append(mine)
            going_on = mine["ms_per_token"] < options.patience * results["all nuggets"][-1]["ms_per_token"]
        print(f"{position:,} of {len(ids):,} tokens", flush=True)

    settings = {key: value for key, value in vars(options).items() if key not in ("data", "out")}
    settings |= {"chunk": streams["all nuggets"].chunk, "length": len(ids)}
    write_report(options.out / "streaming.json", settings | {"results": results})
    with atomic_write(options.out / "streaming.md") as file:
        file.write((table(results) + "\n").encode())
    print(table(results))
    plot_streams(results, options.out / "streaming.png")


class FullAttention:
    """The base LM, which forgets nothing: what it has read stays in its cache."""

    def __init__(self, model: Nugget2D) -> None:
        """Nothing read."""
        self._model, self._cache, self._last = model, DynamicCache(config=model.lm.config), model.start_token

    @torch.no_grad()
    def append_scored(self, ids: Tensor) -> Tensor:
        """(n,) tokens to their nats."""
        losses = []
        for part in ids.split(PART):
            first = [] if self._last is None else [self._last]
            inputs = torch.tensor([[*first, *part[:-1].tolist()]])
            with self._model.parameters_by_role.role("base") as lm:
                logits = lm(input_ids=inputs, **as_cache(lm, self._cache), use_cache=True).logits
            losses.append(token_losses(logits, part[None, -inputs.shape[1] :])[0])
            self._last = int(part[-1])
        return torch.cat(losses)

    def held(self) -> dict[str, int]:
        """States and bytes."""
        keys, values = cached_states(self._cache)
        return {"states": self._cache.get_seq_length(), "bytes": sum(layer.nbytes for layer in (*keys, *values))}


def timed(read: Callable[[Tensor], Tensor], block: Tensor) -> dict[str, float]:
    """How well and how fast a block is read."""
    start = time.perf_counter()
    losses = read(block)
    milliseconds = 1000 * (time.perf_counter() - start) / len(block)
    return {"nats": round(float(losses.mean()), 4), "ms_per_token": round(milliseconds, 4)}


def held(stream: Stream) -> dict[str, int]:
    """What a stream holds."""
    return {"states": stream.cache_size, "nuggets": stream.num_nuggets, "bytes": stream.nbytes}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A line a block; what was not measured stays empty."""
    columns = [(name, key) for name, points in results.items() for key in points[0] if key != "position"]
    found = {name: {point["position"]: point for point in points} for name, points in results.items()}
    positions = [point["position"] for point in next(iter(results.values()))]
    return markdown_table(
        ["tokens read", *(f"{name}: {key}" for name, key in columns)],
        [[f"{at:,}", *(found[name].get(at, {}).get(key, "") for name, key in columns)] for at in positions],
    )


if __name__ == "__main__":
    main()
