"""How fast a corpus is indexed, against one plain prefill process, in one run.

    python benchmarks/indexing.py --data ../shared/data/lm/enwiki2015.val.jsonl.xz \\
        --out benchmarks/results/indexing.json

`nugget2d index` with 1 and 2 workers into a new store, each worker on one thread, start and loading included; and one
process on one thread that tokenizes each document, fills a KV cache with it in one pass, and keeps nothing. Only the
ratios mean much on a shared machine.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.indexing.documents import Document, documents
from nugget2d.indexing.run import index
from nugget2d.indexing.work import Job
from nugget2d.modeling.compatibility import as_cache


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--ratio", type=float, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    read = (one for one in documents(options.data) if isinstance(one, Document))
    texts = [document.text for document in islice(read, options.documents)]
    results = [{"what": "plain prefill", "processes": 1, **prefill(options.model, texts)}]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for workers in options.workers:
            job = Job(store=str(Path(folder, str(workers))), model=options.model, options={"ratio": options.ratio})
            summary = index(corpus, job, workers)
            metrics = speed(summary.added, summary.tokens, summary.seconds)
            results.append({"what": "index", "processes": workers, **metrics})
    for result in results:
        result["over_prefill"] = round(result["tokens_per_s"] / results[0]["tokens_per_s"], 3)
    keys = list(results[0])
    print(markdown_table(keys, [[result[key] for key in keys] for result in results]))
    conditions = {"model": options.model, "data": options.data.name, "ratio": options.ratio, "cores": os.cpu_count()}
    write_report(options.out, {**conditions, "load_average": round(os.getloadavg()[0], 1), "results": results})


@torch.no_grad()
def prefill(name: str, texts: list[str]) -> dict[str, Any]:
    """One forward pass over each text, loading the model included."""
    torch.set_num_threads(1)
    start, tokens = time.perf_counter(), 0
    model = Nugget2D.from_pretrained(name)
    for text in texts:
        ids = model.ids(text)
        model.lm(
            input_ids=ids, **as_cache(model.lm, DynamicCache(config=model.lm.config)), use_cache=True, logits_to_keep=1
        )
        tokens += ids.shape[1]
    return speed(len(texts), tokens, time.perf_counter() - start)


def speed(count: int, tokens: int, seconds: float) -> dict[str, Any]:
    """The metrics of a row."""
    return {
        "documents": count,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "documents_per_s": round(count / seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
    }


if __name__ == "__main__":
    main()
