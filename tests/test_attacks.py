"""No body that a client may send holds up others, or takes memory beyond a small multiple of its size."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from cli_fixtures import save_tiny_model
from nugget2d.server.api_errors import APIError
from nugget2d.server.bodies import MOST_VALUES, parse

MOST = (16 << 20) - 4096
JSON, TEXT = "application/json", "text/plain"
FORM = "multipart/form-data; boundary=b"
CHAT, COMPLETE, FILE = "/v1/chat/completions", "/v1/completions", "/v1/memories/file"


def chat(content: bytes) -> bytes:
    return b'{"model":"tiny","messages":[{"role":"user","content":%s}]}' % content


def items(item: bytes, size: int) -> bytes:
    """A list of `item`s, so many bytes."""
    return b"[" + b",".join([item] * ((size - 100) // (len(item) + 1))) + b"]"


def part(name: bytes, data: bytes, rest: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name, rest, data)


ATTACKS = {
    "millions of parts": (CHAT, JSON, lambda: chat(items(b"{}", MOST)), 413),
    "wrong parts": (CHAT, JSON, lambda: chat(items(b"{}", 3 * MOST_VALUES // 2)), 422),
    "wrong messages": (CHAT, JSON, lambda: b'{"model":"tiny","messages":%s}' % items(b'{"role":"user"}', 240_000), 422),
    "unknown keys": (COMPLETE, JSON, lambda: b"{%s}" % b",".join(b'"%d":1' % n for n in range(1_000_000)), 413),
    "fewer unknown keys": (COMPLETE, JSON, lambda: b"{%s}" % b",".join(b'"%d":1' % n for n in range(30_000)), 422),
    "one long key": (COMPLETE, JSON, lambda: b'{"%s":1}' % (b"k" * (MOST - 100)), 422),
    "stop strings": (COMPLETE, JSON, lambda: b'{"model":"tiny","stop":%s}' % items(b'"a"', 4_000_000), 413),
    "deep nesting": (COMPLETE, JSON, lambda: b"[" * MOST, 413),
    "nesting": (COMPLETE, JSON, lambda: b'{"a":' * 30_000, 422),
    "an integer": (COMPLETE, JSON, lambda: b'{"seed":%s}' % (b"9" * (1 << 20)), 422),
    "a large exponent": (COMPLETE, JSON, lambda: b'{"model":"tiny","temperature":1e999999}', 422),
    "escapes": (COMPLETE, JSON, lambda: b'{"model":"%s"}' % (b"\\u0085" * ((MOST - 100) // 6)), 404),
    "quotes": (COMPLETE, JSON, lambda: b'{"model":"%s"}' % (b'\\"' * ((MOST - 100) // 2)), 404),
    "no JSON": (COMPLETE, TEXT, lambda: b"{" * MOST, 415),
    "fields": (FILE, FORM, lambda: b"".join(part(b"%d" % n, b"") for n in range(200_000)) + b"--b--\r\n", 400),
    "files": (FILE, FORM, lambda: part(b"file", b"a", b'; filename="a"') * 200_000 + b"--b--\r\n", 400),
    "a long field": (FILE, FORM, lambda: part(b"name", b"a" * (MOST - 100)) + b"--b--\r\n", 400),
    "headers of a part": (FILE, FORM, lambda: b"--b\r\n" + b"A: b\r\n" * 2_000_000, 400),
    "ends of lines": (FILE, FORM, lambda: part(b"x", b"\r\n" * (MOST // 2), b'; filename="a"') + b"--b--\r\n", 422),
    "options": (
        FILE,
        FORM,
        lambda: part(b"file", b"a", b'; filename="a"') + part(b"options", items(b"{}", 60_000)) + b"--b--\r\n",
        422,
    ),
    "empty pairs": (FILE, "application/x-www-form-urlencoded", lambda: b"&" * MOST, 415),
    "Punycode": (FILE, FORM + "; charset=punycode", lambda: part(b"name", b"a-" + b"a" * 900_000) + b"--b--\r\n", 415),
}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Address and process id of a server."""
    folder = tmp_path_factory.mktemp("attacked")
    start = "from nugget2d.cli.app import main; main()"
    model = save_tiny_model(folder / "tiny")
    server = subprocess.Popen(
        [sys.executable, "-c", start, "serve", "--model", model, "--store", folder / "store", "--port", "0"],
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "NUGGET2D_API_KEYS"},
    )
    assert server.stderr is not None
    try:
        url = json.loads(server.stderr.readline())["url"]
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield url, server.pid
    finally:
        server.kill()
        server.wait()


def memory(process: int) -> dict[str, int]:
    """MB that a process has (VmRSS), and had at most (VmHWM)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: int(value.split()[0]) >> 10 for name, value in (line.split(":") for line in lines if "kB" in line)}


@pytest.mark.e2e
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_while_others_are_answered(process: tuple[str, int], name: str) -> None:
    url, number = process
    path, kind, body, status = ATTACKS[name]
    sent, times, over = body(), list[float](), threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=60) as bystander:
            while not over.wait(0.05):
                start = time.perf_counter()
                assert bystander.get(f"{url}/health").status_code == 200
                times.append(time.perf_counter() - start)

    Path(f"/proc/{number}/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory(number)["VmRSS"]
    others = threading.Thread(target=ask)
    others.start()
    try:
        response = httpx.post(url + path, content=sent, headers={"Content-Type": kind}, timeout=60)
    finally:
        time.sleep(0.2)
        over.set()
        others.join()
    assert response.status_code == status and len(response.content) < 4000, response.text[:300]
    assert max(times) < 3
    assert memory(number)["VmHWM"] - before < 200


@pytest.mark.e2e
def test_long_addresses_and_headers(process: tuple[str, int]) -> None:
    url, _ = process
    start = time.perf_counter()
    assert httpx.get(f"{url}/v1/memories?{'a=1&' * 15_000}", timeout=60).status_code == 422
    assert httpx.get(f"{url}/v1/memories?tag={'a' * 60_000}", timeout=60).status_code == 200
    assert httpx.get(f"{url}/v1/models/{'a' * 60_000}", timeout=60).status_code == 404
    with suppress(httpx.ReadError):  # the connection is closed before all of it is read
        assert httpx.get(f"{url}/health", headers={"X": "a" * 200_000}, timeout=60).status_code == 400
    assert httpx.get(f"{url}/health").status_code == 200
    assert time.perf_counter() - start < 5


def test_values_are_counted_outside_of_strings() -> None:
    text = ',{[\\"\\\\' * 100_000
    assert parse(json.dumps({"text": text, "more": [1, {"a": '\\"'}, [[]]]}).encode()) == {
        "text": text,
        "more": [1, {"a": '\\"'}, [[]]],
    }
    assert parse(b"\xef\xbb\xbf[1]") == [1]  # as editors of Windows save it
    most = [0] * MOST_VALUES
    assert parse(json.dumps(most).encode()) == most
    pairs = {str(number): "\\" for number in range(MOST_VALUES + 1)}
    for many in ([*most, 0], [[]] * MOST_VALUES, ["a,"] * (MOST_VALUES + 1), pairs):
        with pytest.raises(APIError, match="more than 32,768 values"):
            parse(json.dumps(many).encode())


NO_JSON = [b"", b"{", b"\xff", b'"\xed\xa0\x80"', b'"\\ud800"', b"NaN", b"[1,]", b"\xff\xfe{\0}\0", b"9" * 5000]


@pytest.mark.parametrize("body", NO_JSON)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(APIError, match=r"the body is no JSON in UTF-8: .* at line 1"):
        parse(body)
