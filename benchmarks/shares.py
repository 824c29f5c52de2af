r"""How many of the states that a query sees should be nuggets? Validation text, for the default of `bench lm --share`.

    python benchmarks/shares.py --data ../shared/data/lm/wikitext-2.valid.txt.xz \
        --compressive runs/nano-compressive/model --out benchmarks/results/shares

All shares read the same blocks, so that they can be held against one another; 0 is the plain LM on whole tokens.
"""

import argparse
from itertools import product
from pathlib import Path

import torch

from nugget2d import Nugget2D
from nugget2d.cli.bench import parse_source, read_documents
from nugget2d.evaluation.report import write_report
from nugget2d.evaluation.streaming.full import Full
from nugget2d.evaluation.streaming.methods import COMPRESSIVE, OURS
from nugget2d.evaluation.streaming.nuggets import Compressed
from nugget2d.evaluation.streaming.reader import Budget
from nugget2d.evaluation.streaming.text import articles, cut
from nugget2d.pooled import PooledMemory

BLOCK = 2_048  # scored tokens


def main() -> None:
    """Measure, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--compressive", type=Path, required=True, help="a model trained on pooled memories")
    parser.add_argument("--data", type=parse_source, required=True, metavar="FILE[:FIELD=VALUE]")
    parser.add_argument("--out", type=Path, required=True, help="folder, for a file named after the corpus")
    parser.add_argument("--tokens", type=int, default=10_000, help="to score, in whole blocks")
    parser.add_argument("--states", type=int, nargs="+", default=[256, 128, 64])
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.125, 0.1875, 0.25, 0.375, 0.5])
    parser.add_argument("--chunk", type=int, default=20)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {
        OURS: Nugget2D.from_pretrained(options.model, device=device),
        COMPRESSIVE: PooledMemory.from_pretrained(options.compressive, device=device),
    }
    budgets = [
        Budget(states=states, chunk=options.chunk, ratio=10, share=share)
        for states, share in product(options.states, options.shares)
    ]
    warm_up = max(budget.text for budget in budgets)
    path, where = options.data
    texts = [part for text in read_documents(path, where)[0] for part in articles(text)]
    blocks = cut(models[OURS].tokenizer, texts, warm_up, BLOCK, options.tokens)
    results = []
    for budget, (method, model) in product(budgets, models.items()):
        reader = Compressed(model, budget) if budget.share else Full(model, budget.states, budget.chunk)
        nats = [float(reader(block.ids.to(device), warm_up).double().mean()) for block in blocks]
        mean = round(sum(nats) / len(nats), 4)
        results.append({"states": budget.states, "method": method, "share": budget.share, "nats": mean})
        print(results[-1], flush=True)
    settings = {"corpus": path.name, "tokens": len(blocks) * BLOCK, "warm_up": warm_up, "chunk": options.chunk}
    weights = {method: model.legacy_fingerprint.model for method, model in models.items()}
    write_report(options.out / f"{path.name}.json", settings | {"weights": weights, "results": results})


if __name__ == "__main__":
    main()
