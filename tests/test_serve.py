"""`nugget2d serve`: a process that starts, is asked, and ends well."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

import tiny
from cli_fixtures import save_tiny_model
from nugget2d import Nugget2D
from nugget2d.cli.app import app
from nugget2d.server import batch, run
from nugget2d.server.run import address, served_name
from nugget2d.server.settings import Settings
from serving import serving

pytestmark = pytest.mark.e2e

SERVE = [sys.executable, "-c", "from nugget2d.cli.app import main; main()", "serve"]


def test_a_server_finishes_what_was_begun_when_it_is_told_to_end(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    process = subprocess.Popen(
        [*SERVE, "--model", str(model), "--store", str(tmp_path / "store"), "--port", "0"],
        env=os.environ | {"NUGGET2D_API_KEYS": "first second"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        listening = json.loads(process.stderr.readline())
        assert (listening["event"], listening["model"]) == ("listening", "tiny")
        client = openai.OpenAI(base_url=listening["url"] + "/v1", api_key="second", max_retries=0)
        asked = {"model": "tiny", "prompt": "The keeper", "max_tokens": 400, "temperature": 0}
        stream = client.completions.create(**asked, stream=True)
        text = next(stream).choices[0].text
        process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == tiny.trained("llama", "copies").generate("The keeper", max_new_tokens=400)
        assert process.wait(timeout=60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(listening["url"] + "/health")
        request, stopped = (json.loads(line) for line in process.stderr)
        assert (request["status"], request["route"], stopped["event"]) == (200, "/v1/completions", "stopped")
        assert request["answer_tokens"] > 50
        assert process.stdout is not None and process.stdout.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_what_is_not_done_at_the_end_of_the_grace_is_told_so(
    llama: Nugget2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole answer, a stream and a request that is still arriving: each gets an error in its own form."""
    read, told = batch.read, dict[str, Any]()

    def late(*arguments: Any) -> Any:
        time.sleep(0.1)
        return read(*arguments)

    monkeypatch.setattr(batch, "read", late)
    asked = {"model": "tiny", "prompt": "The keeper", "max_tokens": 1000, "temperature": 0}
    with serving(llama, tmp_path, grace=1) as server, server.http() as http:

        def whole() -> None:
            told["whole"] = http.post("/v1/completions", json=asked)

        def stream() -> None:
            with server.http() as own, own.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
                told["stream"] = [line for line in response.iter_lines() if line]

        threads = [threading.Thread(target=ask) for ask in (whole, stream)]
        for thread in threads:
            thread.start()
        with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port)) as slow:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(head + b"Content-Length: 10\r\n\r\n{")
            while server.service.engine.num_running < 2:
                time.sleep(0.01)
            start = time.monotonic()
            server.end()
            for thread in threads:
                thread.join()
            assert 0.9 < time.monotonic() - start < 5
            assert slow.recv(1000).startswith(b"HTTP/1.1 503 ")
    assert told["whole"].status_code == 503 and told["whole"].json()["error"]["code"] == "shutting_down"
    *texts, last = [json.loads(line.removeprefix("data: ")) for line in told["stream"]]
    assert texts and all(text["choices"] for text in texts)
    assert last["error"]["code"] == "shutting_down"


def refused(*arguments: str) -> str:
    """Why a server does not start."""
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_what_cannot_be_served_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ["--store", str(tmp_path / "store")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen on 127.0.0.1" in refused(*store, "--port", str(taken.getsockname()[1]))
    assert "cannot listen on 127.0.0.1.2" in refused(*store, "--host", "127.0.0.1.2", "--api-key", "a")
    assert "can be reached from other machines" in refused(*store, "--host", "0.0.0.0")
    assert "an API key is empty" in refused(*store, "--api-key", "a", "--api-key", " ")
    assert "model" in refused(*store, "--port", "0", "--model", str(tmp_path / "none"))
    for blank in ("", "  "):
        monkeypatch.setenv("NUGGET2D_API_KEYS", blank)
        assert "NUGGET2D_API_KEYS is set, but has no key in it" in refused(*store)
    monkeypatch.delenv("NUGGET2D_API_KEYS")
    for name in ("https://chat.example.com", "chat.example.com:80", "", "*"):
        assert "--allow-host takes a name" in refused(*store, "--allow-host", name)
    (tmp_path / "file").touch()
    assert "store" in refused("--store", str(tmp_path / "file"), "--port", "0")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'nugget2d[server]'" in refused(*store)


def test_hosts_are_those_of_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Settings] = []
    monkeypatch.setattr(run, "serve", lambda model, store, settings, keys, listener: taken.append(settings))
    start = ["serve", "--model", str(save_tiny_model(tmp_path / "tiny")), "--store", str(tmp_path / "store")]
    hosts = ["--allow-host", "Chat.Example.com", "--allow-host", "[fd00::1]"]
    assert CliRunner().invoke(app, [*start, "--port", "0", *hosts]).exit_code == 0
    assert CliRunner().invoke(app, [*start, "--port", "0", "--host", "0.0.0.0", "--api-key", "a"]).exit_code == 0
    assert [settings.local for settings in taken] == [True, False]
    assert [settings.allow_hosts for settings in taken] == [("chat.example.com", "[fd00::1]"), ()]


def test_an_address_can_be_pasted() -> None:
    assert [address(host, 80) for host in ("127.0.0.1", "::1")] == ["127.0.0.1:80", "[::1]:80"]


def test_the_old_name_of_max_num_seqs_is_still_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(
        run, "serve", lambda model, store, settings, keys, listener: taken.append(settings.max_num_seqs)
    )
    start = [
        "serve",
        "--model",
        str(save_tiny_model(tmp_path / "tiny")),
        "--store",
        str(tmp_path / "store"),
        "--port",
        "0",
    ]
    for options in ([], ["--max-num-seqs", "3"], ["--slots", "5"]):
        assert CliRunner().invoke(app, [*start, *options]).exit_code == 0
    assert taken == [16, 3, 5]
    assert "--slots" not in CliRunner().invoke(app, ["serve", "--help"]).stdout


def test_a_model_is_called_by_the_last_part_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [served_name(name) for name in ("nano", "owner/name", ".", f"{tmp_path}/")] == [
        "nano",
        "name",
        tmp_path.name,
        tmp_path.name,
    ]
