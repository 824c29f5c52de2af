"""A stream over a long text: does it stay as good, as small and as fast as at the start?

    python benchmarks/streaming.py --data ../shared/data/lm/novels100.jsonl.xz --out benchmarks/results/streaming.json

By position in the text: nats per token, milliseconds per token, states in the decoder's cache, nuggets held. `plain` is
what the base predicts from the last tau to tau + chunk tokens alone, recomputed for every chunk.
"""

import argparse
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.losses import token_losses
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True, help="records with a `split` field")
    parser.add_argument("--split", default="val")
    parser.add_argument("--novels", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20_480, help="from the start of each novel")
    parser.add_argument("--block", type=int, default=2_048, help="tokens of a line of the table")
    parser.add_argument("--tau", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=10)
    parser.add_argument("--max-nuggets", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    model = Nugget2D.from_pretrained(options.model)
    source = Source(path=options.data.name, where={"split": options.split})
    texts = islice(documents(source, options.data.parent), options.novels)
    # a token has at least one character, few have more than 16: enough text, and not a whole novel
    ids = [model.ids(text[: 16 * options.tokens])[0, : options.tokens] for text in texts]
    streamed = [measure(model, row, options) for row in ids]
    plain = torch.stack([plain_losses(model, row, options.tau, model.config.window) for row in ids]).mean(0)
    results = []
    for number, blocks in enumerate(zip(*streamed, strict=True)):
        result = {key: round(sum(block[key] for block in blocks) / len(blocks), 4) for key in blocks[0]}
        part = plain[max(0, number * options.block - 1) : (number + 1) * options.block - 1]
        results.append(result | {"plain_nats": round(float(part.mean()), 4)})
    keys = list(results[0])
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "out")}
    write_report(options.out, settings | {"chunk": model.config.window, "results": results})


def measure(model: Nugget2D, ids: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each block of one text."""
    stream = model.stream(options.tau, options.ratio, options.max_nuggets)
    results = []
    for block in ids.split(options.block):
        start = time.perf_counter()
        losses = stream.append_scored(block)
        seconds = time.perf_counter() - start
        results.append(
            {
                "tokens": stream.num_tokens,
                "nats": float(losses.mean()),
                "ms_per_token": 1000 * seconds / len(block),
                "cache_states": stream.cache_size,
                "nuggets": stream.num_nuggets,
                "bytes": stream.nbytes,
            }
        )
    return results


@torch.no_grad()
def plain_losses(model: Nugget2D, ids: Tensor, tau: int, chunk: int) -> Tensor:
    """(n - 1,) nats of each token but the first, from the whole tokens that a stream would have."""
    losses = []
    for start in range(0, len(ids) - 1, chunk):
        seen = ids[None, max(0, start - tau) : start + chunk + 1]
        logits = model.decode(None, seen[:, :-1], prompt=None)
        losses.append(token_losses(logits, seen[:, 1:])[0, -min(chunk, len(ids) - 1 - start) :])
    return torch.cat(losses)


if __name__ == "__main__":
    main()
