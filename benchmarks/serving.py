"""What a stored memory saves a server's clients against sending the whole text again, in one run.

    python benchmarks/serving.py --data ../shared/data/lm/enwiki2015.val.jsonl.xz --out benchmarks/results/serving.json

A server process of its own; for every number of clients, each asks its questions one after another, first with the id
of a document's memory, then with the document's text before the same question. Both are read to their end: the
server's `--max-context` is large enough for all of the text, and the memory's nuggets reach as far. (`nano` was trained
for 1,024 tokens: this measures time, not answers.) Answers take the likeliest token every time.

Metrics of each side: requests a second, answer tokens a second, and percentiles over requests (nearest rank: with few
requests p99 is the slowest) of the time to the first token and to the last.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.text.segmentation import detokenize
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source

QUESTION = "\n\nIn short, "


@dataclass(frozen=True)
class Timing:
    """One request: seconds to the first token and to the last, and how many there were."""

    first: float
    last: float
    tokens: int


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of the document")
    parser.add_argument("--ratio", type=float, default=10)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="of all clients together; at least one each")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    document = read_document(options.model, options.data, options.tokens)
    with server(options) as http:
        start = time.perf_counter()
        memory = http.post("/v1/memories", json={"text": document, "ratio": options.ratio}).raise_for_status().json()
        compress_seconds = time.perf_counter() - start
        bodies = {"memory": {"memory_ids": [memory["id"]], "prompt": QUESTION}, "text": {"prompt": document + QUESTION}}
        model = http.get("/v1/models").json()["data"][0]["id"]
        shared = {"model": model, "max_tokens": options.new_tokens, "temperature": 0}
        for body in bodies.values():  # whatever is done once
            ask(http, body | shared)
        rows = []
        for clients in options.clients:
            sides = {
                side: measure(http, body | shared, clients, max(1, options.requests // clients))
                for side, body in bodies.items()
            }
            rows += [{"clients": clients, "context": side, **metrics} for side, metrics in sides.items()]
            mine, theirs = sides["memory"], sides["text"]
            rows[-2] |= {
                "first_token_sooner": round(theirs["first_p50_s"] / mine["first_p50_s"], 1),
                "requests_more": round(mine["requests_per_s"] / theirs["requests_per_s"], 1),
            }
            print(rows[-2], rows[-1], sep="\n", flush=True)
    keys = list(rows[0])
    print(markdown_table(keys, [[row.get(key, "") for key in keys] for row in rows]))
    metrics = {
        "model": model,
        "cores": os.cpu_count(),
        "document_tokens": memory["num_tokens"],
        "nuggets": memory["num_nuggets"],
        "new_tokens": options.new_tokens,
        "compress_s": round(compress_seconds, 2),
        "results": rows,
    }
    write_report(options.out, metrics)


def read_document(model: str, data: Path, tokens: int) -> str:
    """The first tokens of a corpus."""
    text = "\n".join(documents(Source(path=data.name, max_chars=20 * tokens), data.parent))
    reader = Nugget2D.from_pretrained(model)
    return detokenize(reader.tokenizer, reader.ids(text)[0, :tokens].tolist())


@contextmanager
def server(options: argparse.Namespace) -> Iterator[httpx.Client]:
    """A server that reads the whole document and refuses no request, while the block runs."""
    most = max(options.clients)
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "nugget2d", "serve", "--model", options.model, "--store", store, "--port", "0"]
        limits = ["--max-context", 2 * options.tokens, "--max-num-seqs", most, "--queue", most, "--time-limit", 3600]
        process = subprocess.Popen([*command, *map(str, limits)], stderr=subprocess.PIPE, text=True)
        if process.stderr is None:
            raise RuntimeError("no pipe to the server")
        try:
            url = json.loads(process.stderr.readline())["url"]
            with (
                ThreadPoolExecutor(1) as log,
                httpx.Client(base_url=url, timeout=3600, limits=httpx.Limits(max_connections=most)) as http,
            ):
                log.submit(process.stderr.read)  # else the pipe fills up
                yield http
                process.terminate()
        finally:
            process.terminate()
            process.wait()


def measure(http: httpx.Client, body: dict[str, Any], clients: int, requests: int) -> dict[str, Any]:
    """So many clients at once, each with so many requests one after another."""

    def client(number: int) -> list[Timing]:
        return [ask(http, body) for _ in range(requests)]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        timings = [timing for part in pool.map(client, range(clients)) for timing in part]
    seconds = time.perf_counter() - start
    metrics: dict[str, Any] = {"requests": len(timings), "requests_per_s": round(len(timings) / seconds, 3)}
    metrics["tokens_per_s"] = round(sum(timing.tokens for timing in timings) / seconds, 2)
    for name in ("first", "last"):
        values = sorted(getattr(timing, name) for timing in timings)
        for percent in (50, 99):
            metrics[f"{name}_p{percent}_s"] = round(values[math.ceil(percent / 100 * len(values)) - 1], 4)
    return metrics


def ask(http: httpx.Client, body: dict[str, Any]) -> Timing:
    """One answer, streamed; a token without text (half a character) comes with the next."""
    start, first, tokens = time.perf_counter(), None, 0
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/completions", json=asked) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter()
            if usage := json.loads(line[6:]).get("usage"):
                tokens = usage["completion_tokens"]
    end = time.perf_counter()
    return Timing((first or end) - start, end - start, tokens)


if __name__ == "__main__":
    main()
