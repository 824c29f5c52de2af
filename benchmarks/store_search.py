"""How well `store search` finds documents, by the words of their texts and by those that nuggets tell.

    D=../shared/data/sim/cranfield
    python benchmarks/store_search.py --corpus $D.corpus.jsonl.xz --queries $D.queries.jsonl.xz \\
        --qrels $D.qrels.txt.xz --out benchmarks/results/store_search/cranfield.json

All documents that have a text, all queries that have a judgement. Beside it: BM25 on the texts as they are (k1 = 1.2,
b = 0.75, lower case, no stemming). nDCG@10 takes every judged document as relevant alike; 95 % bootstrap intervals over
queries.
"""

import argparse
import lzma
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from nugget2d import Memory, Nugget2D
from nugget2d.evaluation.intervals import Estimate, estimate
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.indexing.documents import Document, documents
from nugget2d.methods.options import digest
from nugget2d.store import MemoryStore

BATCH = 32  # documents compressed together
Added = tuple[Document, Memory, str | None]  # and its text, if the store is told it
Rank = Callable[[str], Sequence[str]]  # a query to names of documents, best first


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True)
    parser.add_argument("--qrels", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=20, help="of memories whose text the store is not told")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    torch.set_num_threads(1)
    relevant = judgements(options.qrels)
    queries = [query for query in read(options.queries) if query.name in relevant]
    corpus = read(options.corpus)

    def measure(rank: Rank) -> Estimate:
        found = [(rank(query.text)[:10], relevant[query.name]) for query in queries]
        return estimate([[ndcg(names, right), 1] for names, right in found])

    results = [{"ranking": "BM25 on the texts", "ndcg_at_10": measure(bm25(corpus))}]
    model = Nugget2D.from_pretrained(options.model)
    for ranking, memories in (
        ("store search, texts given", told(model, corpus)),
        (f"store search, states alone, ratio {options.ratio:g}", untold(model, corpus, options.ratio)),
    ):
        with tempfile.TemporaryDirectory() as folder, MemoryStore(folder) as store:
            for document, memory, text in memories:
                store.put(memory, model=model, key=digest("document", document.name), name=document.name, text=text)
            found = measure(lambda query: [hit.record.name for hit in store.search(query)])
        results.append({"ranking": ranking, "ndcg_at_10": found})
    rows = [[ranking, *found.values()] for ranking, found in (result.values() for result in results)]
    print(markdown_table(["ranking", "nDCG@10", "low", "high"], rows))
    conditions = {"model": options.model, "corpus": options.corpus.name}
    write_report(options.out, {**conditions, "queries": len(queries), "documents": len(corpus), "results": results})


def read(path: Path) -> list[Document]:
    """The records that have a text."""
    return [one for one in documents(path) if isinstance(one, Document) and one.text.strip()]


def judgements(path: Path) -> dict[str, set[str]]:
    """Of every query, the documents that are relevant to it."""
    relevant: dict[str, set[str]] = {}
    with lzma.open(path, "rt") as file:
        for line in file:
            query, document, *_ = line.split()
            relevant.setdefault(query, set()).add(document)
    return relevant


def told(model: Nugget2D, corpus: Sequence[Document]) -> Iterator[Added]:
    """Every document with its text; the states play no part, and are always the same."""
    memory = model.compress("a")
    for document in corpus:
        segment = replace(memory.segments[0], end=len(document.text))
        yield document, replace(memory, segments=(segment,)), document.text


def untold(model: Nugget2D, corpus: Sequence[Document], ratio: float) -> Iterator[Added]:
    """Every document's memory."""
    for start in range(0, len(corpus), BATCH):
        part = corpus[start : start + BATCH]
        for document, memory in zip(part, model.compress([one.text for one in part], ratio=ratio), strict=True):
            yield document, memory, None


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
