"""`nugget2d serve`: a process that starts, is asked, and ends well."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

import tiny
from cli_fixtures import save_tiny_model
from nugget2d.cli.app import app
from nugget2d.server import run
from nugget2d.server.run import served_name

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
    (tmp_path / "file").touch()
    assert "store" in refused("--store", str(tmp_path / "file"), "--port", "0")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'nugget2d[server]'" in refused(*store)


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
