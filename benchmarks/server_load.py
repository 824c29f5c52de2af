"""What a server takes and gives under load: many clients at once, each with requests of several kinds, in one run.

    python benchmarks/server_load.py --out benchmarks/results/server_load.json

A server process of its own, with its default limits. Every client sends its requests one after another: of ten, six ask
about a stored memory (half of them as a stream), two continue a prompt without one, one compresses a text that is new,
and one lists the memories. Answers take the likeliest token every time.

Metrics, of each kind and of all: requests a second, percentiles of the seconds to the end (nearest rank), statuses;
and of the server the largest resident set, which Linux counts.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx

from nugget2d.evaluation.report import markdown_table, write_report

KINDS = ("memory", "stream", "memory", "list", "prompt", "stream", "memory", "add", "prompt", "stream")


@dataclass(frozen=True)
class Timing:
    """One request: its kind, its status, and seconds to its end."""

    kind: str
    status: int
    seconds: float


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=10, help="of each client")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    text = (files("nugget2d") / "cli" / "demo.txt").read_text(encoding="utf-8")
    with server(options.model) as (http, pid):
        model = http.get("/v1/models").json()["data"][0]["id"]
        memory = http.post("/v1/memories", json={"text": text, "ratio": 10}).raise_for_status().json()
        shared = {"model": model, "max_tokens": options.new_tokens, "temperature": 0}
        before = peak(pid)

        def client(number: int) -> list[Timing]:
            timings = []
            for turn in range(options.requests):
                kind = KINDS[(number + turn) % len(KINDS)]
                timings.append(ask(http, kind, shared, memory["id"], f"{number}, {turn}. {text}"))
            return timings

        start = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            timings = [timing for part in pool.map(client, range(options.clients)) for timing in part]
        seconds = time.perf_counter() - start
        peaks = {"before_MB": before, "peak_MB": peak(pid)}
    rows = [
        summary(kind, [timing for timing in timings if kind in (timing.kind, "all")], seconds)
        for kind in (*dict.fromkeys(KINDS), "all")
    ]
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    metrics = {
        "model": model,
        "cores": os.cpu_count(),
        "clients": options.clients,
        "seconds": round(seconds, 1),
        **peaks,
    }
    print(metrics)
    write_report(options.out, metrics | {"memory_tokens": memory["num_tokens"], "results": rows})


def ask(http: httpx.Client, kind: str, shared: dict[str, Any], memory: str, text: str) -> Timing:
    """One request, read to its end."""
    start = time.perf_counter()
    if kind == "list":
        response = http.get("/v1/memories")
    elif kind == "add":
        response = http.post("/v1/memories", json={"text": text, "ratio": 10})
    elif kind == "prompt":
        response = http.post("/v1/completions", json=shared | {"prompt": text[:1000]})
    else:
        body = {"memory_ids": [memory], "prompt": "\n\nIn short, ", "stream": kind == "stream"}
        response = http.post("/v1/completions", json=shared | body)
    return Timing(kind, response.status_code, time.perf_counter() - start)


def summary(kind: str, timings: list[Timing], seconds: float) -> dict[str, Any]:
    """A row of the table."""
    values = sorted(timing.seconds for timing in timings)
    row: dict[str, Any] = {"kind": kind, "requests": len(values), "requests_per_s": round(len(values) / seconds, 2)}
    for percent in (50, 95):
        row[f"p{percent}_s"] = round(values[math.ceil(percent / 100 * len(values)) - 1], 2)
    return row | {"statuses": dict(Counter(timing.status for timing in timings))}


def peak(pid: int) -> int:
    """The largest resident set of a process so far, in megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


@contextmanager
def server(model: str) -> Iterator[tuple[httpx.Client, int]]:
    """A server with a store of its own while the block runs: a client of it, and its process."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "nugget2d", "serve", "--model", model, "--store", store, "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if process.stderr is None:
            raise RuntimeError("no pipe to the server")
        try:
            url = json.loads(process.stderr.readline())["url"]
            threading.Thread(target=process.stderr.read, daemon=True).start()  # else the pipe fills up
            with httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as http:
                yield http, process.pid
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
