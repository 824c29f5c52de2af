"""How well `store search` finds documents by the states of their nuggets.

    D=../shared/data/sim/cranfield
    python benchmarks/store_search.py --corpus $D.corpus.jsonl.xz --queries $D.queries.jsonl.xz \\
        --qrels $D.qrels.txt.xz --out benchmarks/results/store_search.json

A sample of the queries and of the documents, all that are relevant to these queries among them, at several ratios.
Beside it: BM25 on the texts (k1 = 1.2, b = 0.75), which a search of memories has to be compared with, and chance.
nDCG@10 and recall@10 take every judged document as relevant alike.
"""

import argparse
import lzma
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import torch

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.indexing.documents import Document, documents
from nugget2d.store import MemoryStore

BATCH = 32  # documents compressed together
Rank = Callable[[str], Sequence[str]]  # a query to names of documents, best first


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True)
    parser.add_argument("--qrels", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=50, help="queries")
    parser.add_argument("--others", type=int, default=500, help="documents relevant to none of them")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 4, 10, 20])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    relevant = judgements(options.qrels)
    asked = [query for query in read(options.queries) if query.name in relevant]
    queries = chance.sample(asked, min(options.sample, len(asked)))
    wanted = set().union(*(relevant[query.name] for query in queries))
    corpus = read(options.corpus)
    others = [document for document in corpus if document.name not in wanted]
    kept = [document for document in corpus if document.name in wanted]
    kept += chance.sample(others, min(options.others, len(others)))

    def measure(rank: Rank) -> dict[str, float]:
        found = [(rank(query.text)[:10], relevant[query.name]) for query in queries]
        return {
            "ndcg_at_10": round(mean(ndcg(names, right) for names, right in found), 4),
            "recall_at_10": round(mean(len(right & set(names)) / len(right) for names, right in found), 4),
        }

    names = [document.name for document in kept]
    results = [
        {"ranking": "chance", **measure(lambda query: chance.sample(names, len(names)))},
        {"ranking": "BM25", **measure(bm25(kept))},
    ]
    model = Nugget2D.from_pretrained(options.model)
    for ratio in options.ratios:
        with tempfile.TemporaryDirectory() as folder, MemoryStore(folder) as store:
            fill(store, model, kept, ratio)
            found = measure(lambda query: [hit.record.name for hit in store.search(query)])
        results.append({"ranking": f"store search, ratio {ratio:g}", **found})
    keys = list(results[0])
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    conditions = {"model": options.model, "corpus": options.corpus.name, "seed": options.seed}
    write_report(options.out, {**conditions, "queries": len(queries), "documents": len(kept), "results": results})


def read(path: Path) -> list[Document]:
    """The records that have a text."""
    return [one for one in documents(path) if isinstance(one, Document) and one.text.strip()]


def judgements(path: Path) -> dict[str, set[str]]:
    """Of every query, the documents that are relevant to it."""
    relevant: dict[str, set[str]] = {}
    with lzma.open(path, "rt") as file:
        for line in file:
            query, document, _ = line.split()
            relevant.setdefault(query, set()).add(document)
    return relevant


def fill(store: MemoryStore, model: Nugget2D, kept: Sequence[Document], ratio: float) -> None:
    """Every document's memory."""
    for start in range(0, len(kept), BATCH):
        part = kept[start : start + BATCH]
        for document, memory in zip(part, model.compress([one.text for one in part], ratio=ratio), strict=True):
            store.put(memory, model=model, name=document.name)


def bm25(kept: Sequence[Document]) -> Rank:
    """Okapi BM25 over lower-case words and numbers."""
    counts = {document.name: Counter(words(document.text)) for document in kept}
    lengths = {name: sum(count.values()) for name, count in counts.items()}
    average = mean(lengths.values())
    spread = Counter(word for count in counts.values() for word in count)

    def score(name: str, asked: list[str]) -> float:
        total = 0.0
        for word in asked:
            if often := counts[name][word]:
                rarity = math.log(1 + (len(counts) - spread[word] + 0.5) / (spread[word] + 0.5))
                total += rarity * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * lengths[name] / average))
        return total

    def rank(query: str) -> list[str]:
        asked = words(query)
        return sorted(counts, key=lambda name: score(name, asked), reverse=True)

    return rank


def words(text: str) -> list[str]:
    """Lower case, letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def ndcg(names: Sequence[str], right: set[str]) -> float:
    """Normalised discounted cumulative gain of the first ten, relevance 0 or 1."""
    gain = sum(1 / math.log2(place + 2) for place, name in enumerate(names) if name in right)
    return gain / sum(1 / math.log2(place + 2) for place in range(min(10, len(right))))


if __name__ == "__main__":
    main()
