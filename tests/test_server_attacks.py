"""What one client does to a server on purpose: a process of its own, bounded in seconds, memory, files and log."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc"
    ),
]

SERVE = [sys.executable, "-m", "nugget2d", "serve", "--model", "nano", "--port", "0", "--time-limit", "5"]
LIMITS = ["--max-memory", "1000000000", "--max-stored", "40000000"]
DESCRIPTORS = 256
MB = 1 << 20


class Attacked:
    """A server that is attacked."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        self.process, self.log = process, list[str]()
        self.url = json.loads(process.stderr.readline())["url"]
        threading.Thread(target=self.log.extend, args=(process.stderr,), daemon=True).start()
        self.attack_begins()

    def attack_begins(self) -> None:
        """From now on peaks are measured."""
        self.log.clear()
        self._proc("clear_refs").write_text("5")
        self._before = self._kilobytes("VmRSS")

    @property
    def growth(self) -> int:
        """Bytes of memory more than before, at most."""
        return (self._kilobytes("VmHWM") - self._before) * 1024

    def post(self, path: str, body: dict[str, Any]) -> tuple[httpx.Response, float]:
        """The answer, and seconds."""
        start = time.monotonic()
        response = httpx.post(self.url + path, json=body, timeout=120)
        return response, time.monotonic() - start

    def get(self, path: str) -> float:
        """Seconds of a light request."""
        start = time.monotonic()
        assert httpx.get(self.url + path, timeout=60).status_code == 200
        return time.monotonic() - start

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.process.pid}/{name}")

    def _kilobytes(self, name: str) -> int:
        return next(int(line.split()[1]) for line in self._proc("status").read_text().splitlines() if name in line)


def _few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    process = subprocess.Popen(
        [*SERVE, *LIMITS, "--store", str(tmp_path_factory.mktemp("store"))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_few_descriptors,
    )
    try:
        server = Attacked(process)
        server.post("/v1/completions", {"model": "nano", "prompt": "Hello", "max_tokens": 4})  # what is done once
        yield server
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def server(started: Attacked) -> Attacked:
    started.attack_begins()
    return started


def test_texts_of_megabytes(server: Attacked) -> None:
    body = {"model": "nano", "prompt": "a" * 4_000_000, "max_tokens": 4}
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(server.post, "/v1/completions", body) for _ in range(4)]
        light = []
        while not all(one.done() for one in asking):
            light += [server.get("/v1/memories"), server.get("/health")]
            time.sleep(0.1)
    for response, seconds in (one.result() for one in asking):
        assert response.status_code in (413, 504), response.text
        assert seconds < 7  # five, and what it takes to send and parse four times four megabytes
    assert max(light) < 2
    assert server.growth < 250 * MB


def test_clients_who_leave(server: Attacked) -> None:
    """What was begun for them ends, and its memory is free again."""
    body = {"text": "The sea was calm. " * 12_000, "ratio": 20}
    for _ in range(6):
        with suppress(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/memories", json=body, timeout=0.5)
    response, seconds = server.post("/v1/completions", {"model": "nano", "prompt": "Hello", "max_tokens": 4})
    assert response.status_code == 200 and seconds < 5
    assert server.growth < 300 * MB


def test_one_memory_named_often(server: Attacked) -> None:
    made, _ = server.post("/v1/memories", {"text": "The sea was calm. " * 400, "ratio": 1, "dtype": "float32"})
    memory = made.json()
    assert memory["bytes"] > 15 * MB
    server.attack_begins()
    body = {"model": "nano", "memory_ids": [memory["id"]] * 64, "prompt": "So", "max_tokens": 4}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.post("/v1/completions", body), range(4)))
    assert {response.status_code for response, _ in answers} <= {200, 429, 504}
    assert all(seconds < 7 for _, seconds in answers)
    assert server.growth < 300 * MB  # it would be a gigabyte for each


def test_a_memory_as_large_as_its_text_allows(server: Attacked) -> None:
    text, whole = "The sea was calm. " * 22_000, {"ratio": 1, "dtype": "float32"}
    response, seconds = server.post("/v1/memories", {"text": text, **whole})
    assert response.status_code == 413 and seconds < 5
    assert "500,000,000 for requests" in response.json()["error"]["message"]
    response, seconds = server.post("/v1/memories", {"text": text[:15_000], **whole})
    assert response.status_code == 413 and seconds < 5
    assert "of 40,000,000 are taken" in response.json()["error"]["message"]
    assert server.growth < 250 * MB


def test_more_connections_than_file_descriptors(server: Attacked) -> None:
    """None sends a whole request, half of them send something."""
    port = httpx.URL(server.url).port
    opened = []
    try:
        for number in range(2 * DESCRIPTORS):
            with suppress(OSError):
                opened.append(socket.create_connection(("127.0.0.1", port or 0), timeout=2))
                if number % 2:
                    opened[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        assert server.get("/health") < 10
        assert server.get("/v1/memories") < 5
        assert len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) < DESCRIPTORS
    finally:
        for one in opened:
            one.close()
    assert len(server.log) < 20 and not any("Traceback" in line for line in server.log)
