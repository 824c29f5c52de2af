"""What one client can take of a server: each limit holds before the work, and leaves the others' share."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import LimitError, OverloadError, ShutdownError
from nugget2d.server import batch, connections, limits, run
from nugget2d.server.connections import FailureLog
from nugget2d.server.costs import count_tokens
from nugget2d.server.limits import Places, Quota, Room, default_memory
from nugget2d.store import MemoryStore
from serving import Running, serving, soon

pytestmark = pytest.mark.e2e

ASK: dict[str, Any] = {"model": "tiny", "prompt": "The keeper", "max_tokens": 4, "temperature": 0}


def post(server: Running, path: str, body: dict[str, Any], key: str = "none") -> httpx.Response:
    with server.http(key) as http:
        return http.post(path, json=body)


def at_once(count: int, call: Callable[[int], httpx.Response]) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


# ---- places ----


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No step of an answer is done before this is set."""
    go, read = threading.Event(), batch.read

    def late(*arguments: Any) -> Any:
        go.wait(30)
        return read(*arguments)

    monkeypatch.setattr(batch, "read", late)
    return go


def burst(
    server: Running, held: threading.Event, keys: list[str], body: dict[str, Any] = ASK
) -> dict[str, list[httpx.Response]]:
    """The answers to requests at once, one for each key; none is done before all were refused or have a place."""
    answers: dict[str, list[httpx.Response]] = {key: [] for key in keys}

    def ask(number: int) -> httpx.Response:
        answers[keys[number]].append(post(server, "/v1/completions", body, keys[number]))
        return answers[keys[number]][-1]

    def release() -> None:
        engine = server.service.engine
        soon(lambda: sum(map(len, answers.values())) + engine.num_running + engine.num_waiting == len(keys))
        held.set()

    releasing = threading.Thread(target=release)
    releasing.start()
    at_once(len(keys), ask)
    releasing.join()
    return answers


def statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


def test_a_burst_gets_exactly_the_places_there_are(llama: Nugget2D, tmp_path: Path, held: threading.Event) -> None:
    with serving(llama, tmp_path, max_num_seqs=1, queue=3) as server:
        assert statuses(burst(server, held, ["none"] * 12)["none"]) == {200: 4, 429: 8}
        assert post(server, "/v1/completions", ASK).status_code == 200


def test_one_key_leaves_places_for_others(llama: Nugget2D, tmp_path: Path, held: threading.Event) -> None:
    with serving(llama, tmp_path, ("one", "two"), max_num_seqs=1, queue=3) as server:
        answers = burst(server, held, ["one"] * 8 + ["two"])
        assert statuses(answers["one"]) == {200: 2, 429: 6}
        assert statuses(answers["two"]) == {200: 1}


def test_places_are_given_back_once() -> None:
    places = Places(4, several_keys=True)
    give = [places.take("a"), places.take("a")]
    with pytest.raises(OverloadError, match="2 requests of this key are running or waiting already; the 2 places"):
        places.take("a")
    places.take("b")
    with pytest.raises(OverloadError, match="of this key"):
        places.take("b")
    places.take("c")
    with pytest.raises(OverloadError, match="4 requests are running or waiting already"):
        places.take("d")
    for _ in range(2):
        give[0]()
    places.take("d")
    with pytest.raises(OverloadError):
        places.take("d")
    alone = Places(2, several_keys=False)
    assert alone.take("") and alone.take("")


# ---- memory ----


def test_room_is_held_until_it_is_given_back() -> None:
    room = Room(1000)
    first, second = room.share(), room.share()
    first.take(600)
    with pytest.raises(OverloadError, match="about 500 bytes of memory, of 1,000 for requests 600 are in use"):
        second.take(500)
    second.take(300)
    with pytest.raises(LimitError, match="about 1,100 bytes of memory, the server has 1,000"):
        second.take(800)
    assert room.held == 900
    first.give(100)
    second.take(200)
    first.close()
    assert room.held == 500
    with pytest.raises(ShutdownError):  # work of a request that is over
        first.take(1)
    first.close()
    second.close()
    assert room.held == 0


def test_default_memory_is_half_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CGROUP", tmp_path / "memory.max")
    machine = default_memory()
    assert machine > 1 << 28
    for text, nbytes in (("max\n", machine), ("1000\n", 500)):
        limits.CGROUP.write_text(text)
        assert default_memory() == nbytes


def test_requests_that_need_more_memory_than_there_is(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path, max_memory=1 << 20, max_bytes=1 << 20) as server:
        for path, body in (
            ("/v1/memories", {"text": tiny.TEXT[:900], "ratio": 1, "dtype": "float32"}),
            ("/v1/completions", ASK | {"max_tokens": 1000}),
            ("/v1/completions", ASK | {"prompt": "a" * 2000}),
            ("/v1/completions", ASK | {"prompt": "a" * 200_000}),
        ):
            response = post(server, path, body)
            assert response.status_code == 413, response.text
            assert response.json()["error"]["code"] == "too_large"
            assert "524,288 for requests" in response.json()["error"]["message"]
        assert soon(lambda: server.service.room.held == 0)
        assert post(server, "/v1/completions", ASK).status_code == 200


def test_requests_wait_their_turn_where_memory_is_in_use(
    llama: Nugget2D, tmp_path: Path, held: threading.Event
) -> None:
    with serving(llama, tmp_path, max_memory=1 << 20) as server:
        answers = burst(server, held, ["none"] * 8, ASK | {"max_tokens": 300})["none"]
        assert statuses(answers) == {200: 1, 429: 7}
        refused = [answer.json()["error"]["message"] for answer in answers if answer.status_code == 429]
        assert all("are in use; try again later" in message for message in refused)
        assert soon(lambda: server.service.room.held == 0)


def test_a_memory_is_loaded_once_however_often_it_is_named(
    llama: Nugget2D, tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    get = MemoryStore.get

    def counted(store: MemoryStore, id: str, **options: Any) -> Any:
        loaded.append(id)
        return get(store, id, **options)

    monkeypatch.setattr(MemoryStore, "get", counted)
    with serving(llama, tmp_path) as server:
        made = post(server, "/v1/memories", {"text": tiny.TEXT[:200]}).json()
        body = ASK | {"memory_ids": [made["id"]] * 3}
        usages = [answer.json()["usage"] for answer in burst(server, held, ["none"] * 3, body)["none"]]
        assert all(usage["prompt_tokens_details"]["cached_tokens"] == 3 * made["num_tokens"] for usage in usages)
        assert loaded == [made["id"]]
        assert soon(lambda: not server.service._loader._memories)  # and forgotten when nobody reads it


def test_memories_out_of_reach_are_counted_and_not_loaded(tmp_path: Path) -> None:
    model = tiny.trained("llama", "copies", context=100)
    with serving(model, tmp_path) as server:
        made = [post(server, "/v1/memories", {"text": tiny.TEXT[:end]}).json() for end in (80, 300, 120)]
        ids, tokens = [one["id"] for one in made], [one["num_tokens"] for one in made]
        assert tokens[2] < 100 < tokens[1] + tokens[2]
        near = post(server, "/v1/completions", ASK | {"memory_ids": ids[1:]}).json()
        for path in (tmp_path / "memories").glob("*/*.nugget"):
            if Memory.load(path).num_tokens == tokens[0]:
                path.unlink()
        all_of_them = post(server, "/v1/completions", ASK | {"memory_ids": ids}).json()
    assert all_of_them["choices"] == near["choices"]
    usages = [answer["usage"]["prompt_tokens_details"] for answer in (all_of_them, near)]
    for name in ("cached_tokens", "unread_tokens"):
        assert usages[0][name] == usages[1][name] + tokens[0]


# ---- texts ----


def test_a_long_text_is_refused_when_enough_of_it_was_read(llama: Nugget2D) -> None:
    looks: list[None] = []
    look = lambda: looks.append(None)  # noqa: E731
    with pytest.raises(LimitError, match="more than 15,000 tokens"):
        count_tokens(llama.tokenizer, ["a" * 110_000], 15_000, look)
    assert 1 <= len(looks) <= 8
    looks.clear()
    with pytest.raises(LimitError, match="120,001 characters, the server reads 120,000"):  # a token may be 80 of them
        count_tokens(llama.tokenizer, ["a", "a" * 120_000], 15_000, look)
    assert not looks
    text = tiny.TEXT * 30
    tokens = len(llama.ids(text)[0])
    assert tokens <= count_tokens(llama.tokenizer, [text, ""], 10 * tokens, look) <= tokens + len(text) // 10_000 + 1


def test_time_limits_hold_while_texts_are_read(llama: Nugget2D, tmp_path: Path) -> None:
    """Nor do other routes wait, and what is in vain ends."""
    with serving(llama, tmp_path, seconds=1, max_input=1 << 40, max_memory=1 << 40, max_bytes=1 << 30) as server:
        seconds: list[float] = []

        def ask(number: int) -> httpx.Response:
            start = time.monotonic()
            response = post(server, "/v1/completions", ASK | {"prompt": "ab " * 4_000_000})
            seconds.append(time.monotonic() - start)
            return response

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, number) for number in range(4)]
            while not all(one.done() for one in asking):
                start = time.monotonic()
                assert httpx.get(f"{server.url}/v1/memories", timeout=60).status_code == 200
                assert time.monotonic() - start < 3  # a minute and more before
                time.sleep(0.05)
        assert [one.result().json()["error"]["code"] for one in asking] == ["time_limit"] * 4
        assert max(seconds) < 8  # of which the bodies take most
        assert soon(lambda: server.service.room.held == 0)


# ---- what is stored ----


def test_an_owner_keeps_as_much_as_it_may(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path, ("one", "two"), max_stored=20_000) as server:
        texts, how = [tiny.TEXT[start : start + 150] for start in range(0, 900, 150)], {"ratio": 2, "dtype": "float32"}
        answers = at_once(6, lambda number: post(server, "/v1/memories", {"text": texts[number], **how}, "one"))
        kept = [answer.json() for answer in answers if answer.status_code == 201]
        refused = [answer for answer in answers if answer.status_code == 413]
        assert len(kept) + len(refused) == 6 and kept and refused
        assert sum(memory["bytes"] for memory in kept) <= 20_000
        error = refused[0].json()["error"]
        assert error["code"] == "too_large" and "of 20,000 are taken; delete memories" in error["message"]
        assert post(server, "/v1/memories", {"text": texts[0], **how}, "two").status_code == 201
        body = {"text": texts[answers.index(refused[0])], **how}
        assert soon(lambda: not server.service._quota._coming)
        assert post(server, "/v1/memories", body, "one").status_code == 413
        with server.http("one") as http:
            http.delete(f"/v1/memories/{kept[0]['id']}")
        assert post(server, "/v1/memories", body, "one").status_code == 201


def test_what_is_being_made_counts() -> None:
    quota = Quota(100)
    give = quota.take("a", 60, lambda: 0)
    with pytest.raises(LimitError, match="would take 50 bytes, 60 of 100 are taken"):
        quota.take("a", 50, lambda: 0)
    quota.take("b", 100, lambda: 0)
    give()
    with pytest.raises(LimitError):
        quota.take("a", 50, lambda: 51)
    quota.take("a", 50, lambda: 50)


# ---- connections ----


def connect(server: Running, sent: bytes = b"") -> socket.socket:
    opened = socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port))
    opened.settimeout(5)
    opened.sendall(sent)
    return opened


def closed(opened: socket.socket) -> bool:
    """Whether the server closes it soon; what it has sent before is passed over."""
    try:
        while opened.recv(1000):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_silent_and_half_sent_requests_are_cut_off(
    llama: Nugget2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "IDLE_SECONDS", 0.5)
    with serving(llama, tmp_path) as server:
        start = time.monotonic()
        silent, half = connect(server), connect(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        again = connect(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert again.recv(1000).startswith(b"HTTP/1.1 200")
        again.sendall(b"G")
        slow = connect(server)
        for byte in b"GET /":  # a byte now and then does not stop the clock
            slow.sendall(bytes([byte]))
            time.sleep(0.05)
        assert all(closed(one) for one in (silent, half, again, slow))
        assert 0.4 < time.monotonic() - start < 4
        with connect(server) as late:
            time.sleep(0.2)
            late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert late.recv(1000).startswith(b"HTTP/1.1 200")


def test_of_too_many_connections_the_oldest_idle_one_gives_way(
    llama: Nugget2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    monkeypatch.setattr(run, "max_connections", lambda: 8)
    body = json.dumps(ASK | {"stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    with serving(llama, tmp_path) as server:
        busy = connect(server, head % len(body) + body)
        assert busy.recv(12) == b"HTTP/1.1 200"
        idle = []
        for _ in range(20):
            idle.append(connect(server, b"GET"))
            time.sleep(0.02)  # so that they are accepted in this order
        assert all(closed(one) for one in idle[:12])
        assert httpx.get(f"{server.url}/health").status_code == 200
        held.set()
        answer = b""
        while part := busy.recv(10_000):
            answer += part
            if b"[DONE]" in answer:
                break
        assert b"[DONE]" in answer


def test_a_client_who_does_not_read_is_cut_off(
    llama: Nugget2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.3)
    with serving(llama, tmp_path) as server, connect(server) as lazy:

        def cut_off() -> bool:
            try:
                lazy.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        assert soon(cut_off)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_failure_that_repeats_is_one_line_a_minute(capfd: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    failures = FailureLog(lambda: now[0])
    for second in range(130):
        now[0] = float(second)
        for kind in ("no descriptors", "other"):
            failures(None, {"message": kind, "exception": OSError(24, "Too many open files")})  # type: ignore[arg-type]
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["unsaid"] for line in lines if line["reason"] == "no descriptors"] == [0, 59, 59]
    assert len(lines) == 6 and "Too many open files" in lines[0]["error"]
