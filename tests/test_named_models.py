"""The model that a memory names: read with if it is on this machine, never fetched unasked, none of its code run."""

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.checkpoints import resolve
from nugget2d.cli.app import app
from nugget2d.errors import ModelError
from test_plain_lms import bring_code, publish, save

TEXT = "The dog looked up as if it had counted too."
COMMANDS = [["generate", "--prompt", " It"], ["reconstruct"], ["inspect", "--json"]]
commands = pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What this process asked the network for, where it may."""
    asked: list[object] = []

    def ask(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise RuntimeError("no network in tests")  # an OSError would be tried again and again

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)
    return asked


@pytest.fixture
def compressor(tmp_path: Path) -> Path:
    tiny.trained("llama", "copies", name="team/compressor").save_pretrained(tmp_path / "compressor")
    return tmp_path / "compressor"


def memory_naming(name: str, model: Nugget2D, path: Path) -> Path:
    memory = model.compress(TEXT, ratio=2)
    replace(memory, fingerprint=replace(memory.fingerprint, name=name)).save(path)
    return path


def run(command: list[str], path: Path, *more: object, stdin: str = "y\n" * 9) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [command[0], str(path), *command[1:], *map(str, more)], input=stdin)
    return result.exit_code, result.stdout, result.stderr


@commands
def test_nothing_is_fetched_unasked(
    command: list[str], hub: Path, calls: list[object], compressor: Path, tmp_path: Path
) -> None:
    path = memory_naming("evil/repository", Nugget2D.from_pretrained(compressor), tmp_path / "a.nugget")
    code, printed, error = run(command, path)
    assert (code, printed, error.count("\n")) == (1, "", 1)
    assert "made by 'evil/repository': fetch it with --model evil/repository" in error
    assert not calls
    assert run(command, path, "--model", "evil/repository")[0] == 1
    assert calls


def test_attention_code_of_the_hub_is_never_fetched(calls: list[object], tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "kernels-community/flash-attn"}))
    with pytest.raises(ModelError, match=r"names attention code of the hub \(kernels-community/flash-attn\)"):
        Nugget2D.from_pretrained(folder)
    assert not calls


@commands
def test_what_was_downloaded_before_is_read_with(
    command: list[str], hub: Path, calls: list[object], compressor: Path, tmp_path: Path
) -> None:
    publish(hub, "team/compressor", compressor)
    path = memory_naming("team/compressor", Nugget2D.from_pretrained(compressor), tmp_path / "a.nugget")
    code, printed, error = run(command, path)
    assert code == 0 and printed, error
    assert not calls


def test_a_base_that_is_not_here_is_not_fetched_either(hub: Path, calls: list[object], tmp_path: Path) -> None:
    publish(hub, "team/lm", save(tmp_path / "lm"))
    model = Nugget2D.from_base(tmp_path / "lm", lora_rank=2, scorer_layer=1)
    model.save_pretrained(tmp_path / "adapters", base=False)
    record = tmp_path / "adapters" / "base.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"name": "team/lm"}))
    publish(hub, "team/adapters", tmp_path / "adapters")
    path = memory_naming("team/adapters", model, tmp_path / "a.nugget")
    assert run(["reconstruct"], path)[0] == 0
    shutil.rmtree(hub / "models--team--lm")
    code, _, error = run(["reconstruct"], path)
    assert code == 1 and "unknown model 'team/lm'" in error and error.count("\n") == 1
    assert not calls


def test_half_of_a_download_is_not_completed(hub: Path, calls: list[object], tmp_path: Path) -> None:
    publish(hub, "team/lm", save(tmp_path / "lm"))
    path = memory_naming("team/lm", Nugget2D.from_pretrained(tmp_path / "lm"), tmp_path / "a.nugget")
    (next((hub / "models--team--lm" / "snapshots").iterdir()) / "model.safetensors").unlink()
    code, _, error = run(COMMANDS[0], path)
    assert code == 1 and "fetch it with --model team/lm" in error and error.count("\n") == 1
    assert not calls


def test_local_files_only_keeps_to_this_machine(hub: Path, calls: list[object], tmp_path: Path) -> None:
    publish(hub, "team/lm", save(tmp_path / "lm"))
    assert Nugget2D.from_pretrained("team/lm", local_files_only=True).config.name == "team/lm"
    with pytest.raises(ModelError, match="nothing of that name was downloaded"):
        Nugget2D.from_pretrained("team/other", local_files_only=True)
    assert not calls
    with pytest.raises(ModelError, match="the hub"):
        resolve.find_compressor("team/other")
    assert calls


@commands
def test_code_of_a_named_folder_is_not_run(command: list[str], tmp_path: Path) -> None:
    """Whatever is answered on standard input."""
    folder = save(tmp_path / "theirs")
    path = memory_naming(str(folder), Nugget2D.from_pretrained(folder), tmp_path / "a.nugget")
    bring_code(folder, "config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    code, printed, error = run(command, path)
    assert (code, printed, error.count("\n")) == (1, "", 1)
    assert "brings its own code (auto_map), which is never run" in error
    assert not (folder / "ran").exists()


def test_a_bundled_model_is_read_with(calls: list[object]) -> None:
    path = Path(__file__).parent / "data" / "v1" / "float32.nugget"
    assert Memory.load(path).fingerprint.name == "nano"
    code, printed, _ = run(["inspect", "--json"], path)
    assert code == 0 and json.loads(printed)["model"] == "nano"
    assert not calls


@pytest.mark.parametrize("part", ["base", "tokenizer"])
def test_a_missing_part_of_a_folder_is_not_looked_for_on_the_hub(
    part: str, compressor: Path, hub: Path, calls: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the folder `compressor`, "compressor/base" would be a hub id."""
    monkeypatch.chdir(compressor.parent)
    shutil.rmtree(compressor / part)
    for local_files_only in (True, False):
        with pytest.raises(ModelError):
            Nugget2D.from_pretrained("compressor", local_files_only=local_files_only)
    assert not calls
