r"""How much better than even spacing could ANY choice of nuggets be? A search with hindsight, window by window.

    python -m research.selection_bound --data ../shared/data/lm/enwiki2015.val.jsonl.xz \
        --out research/results/selection-bound.json

From even spacing on, each round tries to move every nugget by up to `--reach` tokens and keeps, in every window, the
one move that lowers that very window's reconstruction loss most. A scorer cannot know the loss beforehand: what the
search gains is more than one could learn to gain by as many moves.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.evaluation.windows import sample_windows
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.selection import count_nuggets, even_ends
from nugget2d.text.segmentation import tokenize
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source

ROWS = 64  # choices read at once


def main() -> None:
    """Search, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True, help=".txt, .jsonl or .jsonl.xz with one article a record")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="+", default=[20, 32, 50])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--reach", type=int, default=4)
    options = parser.parse_args()

    model = Nugget2D.from_pretrained(options.model, device="cuda" if torch.cuda.is_available() else "cpu")
    texts = documents(Source(path=options.data.name), options.data.parent)
    ids = [tokenize(model.tokenizer, text)[0] for text in texts]
    windows = sample_windows(model.tokenizer, ids, options.windows, options.length)
    rows = torch.tensor([window.ids for window in windows], device=model.device)
    results = []
    for ratio in options.ratios:
        results += search(model, rows, ratio, options.rounds, options.reach)
    keys = list(results[0])
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    write_report(options.out, {"model": options.model, "windows": options.windows, "results": results})


def search(model: Nugget2D, ids: Tensor, ratio: float, rounds: int, reach: int) -> list[dict[str, Any]]:
    """Metrics of (N, n) windows at even spacing (round 0) and after each round of the search."""
    count = count_nuggets([ids.shape[1]], ratio)[0]
    chosen = even_ends(ids.shape[1], count).to(ids.device).repeat(len(ids), 1)
    results = []
    for number in range(rounds + 1):
        if number:
            chosen = best_move(model, ids, chosen, reach)
        losses, hits = read(model, ids, chosen)
        gaps = torch.diff(chosen, prepend=torch.full_like(chosen[:, :1], -1), dim=1)
        results.append(
            {
                "ratio": ratio,
                "nuggets": count,
                "round": number,
                "nats": round(float(losses.mean()), 4),
                "accuracy": round(float(hits.float().mean()), 4),
                "longest_gap": int(gaps.max()),
            }
        )
        print(results[-1], flush=True)
    return results


def best_move(model: Nugget2D, ids: Tensor, chosen: Tensor, reach: int) -> Tensor:
    """(N, k) nuggets after the one move in each window that helps it most, if any does."""
    before, _ = read(model, ids, chosen)
    best = before.mean(1).tolist()
    moved = chosen.clone()
    owners, choices = [], []
    for row, places in enumerate(chosen.tolist()):
        for nugget, (low, place, high) in enumerate(zip([-1, *places], places, places[1:], strict=False)):
            for new in range(max(low + 1, place - reach), min(high, place + reach + 1)):
                if new != place:
                    owners.append(row)
                    choices.append([*places[:nugget], new, *places[nugget + 1 :]])
    tried = torch.tensor(choices, device=ids.device)
    after, _ = read(model, ids[owners], tried)
    for owner, choice, loss in zip(owners, tried, after.mean(1).tolist(), strict=True):
        if loss < best[owner]:
            best[owner], moved[owner] = loss, choice
    return moved


@torch.no_grad()
def read(model: Nugget2D, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(N, n) loss of every token, read from the (N, k) tokens that are chosen, and whether it is the first guess."""
    losses, hits = [], []
    for part, places in zip(ids.split(ROWS), chosen.split(ROWS), strict=True):
        rows, length = part.shape
        wanted = torch.zeros(part.shape, device=part.device).scatter(1, places, 1.0)  # scores whose top k they are
        encoded = model.encode(part, [length] * rows, [places.shape[1]] * rows, selection="learned", scores=wanted)
        logits = model.decode(encoded.nuggets, part[:, :-1], prompt="reconstruct")
        losses.append(token_losses(logits, part))
        hits.append(logits.argmax(-1) == part)
    return torch.cat(losses), torch.cat(hits)


if __name__ == "__main__":
    main()
