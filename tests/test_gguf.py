"""GGUF files: converted once, by whoever comes first, into a folder like any other."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from nugget2d import Nugget2D
from nugget2d.checkpoints import gguf
from nugget2d.errors import ModelError, OutputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUGGET2D_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "lm.gguf").write_bytes(b"weights")
    return tmp_path / "lm.gguf"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that was converted, into a tiny LM: reading real ones is the slow test's matter."""
    calls: list[Path] = []

    def convert(path: Path, folder: Path) -> None:
        calls.append(path)
        tiny.lm().save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)

    monkeypatch.setattr(gguf, "_convert", convert)
    return calls


def test_a_file_is_converted_once(file: Path, cache: Path, conversions: list[Path], monkeypatch) -> None:
    model = Nugget2D.from_pretrained(file)
    assert (model.config.name, model.lm.config.name_or_path, model.has_compressor) == (str(file), str(file), False)
    monkeypatch.chdir(file.parent)
    assert Nugget2D.from_pretrained("lm.gguf").fingerprint.model == model.fingerprint.model
    assert Nugget2D.from_base(file, lora_rank=2).fingerprint.model == model.fingerprint.model
    assert conversions == [file]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("write", [Path.write_bytes, lambda file, data: (file.unlink(), file.write_bytes(data))])
def test_another_file_of_that_name_is_converted_anew(
    file: Path, conversions: list[Path], write: Callable[[Path, bytes], object]
) -> None:
    folder = gguf.converted(file)
    write(file, b"others")
    assert gguf.converted(file) != folder
    assert conversions == [file, file]


def test_two_processes_at_once_are_fine(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(path: Path, folder: Path) -> None:
        (folder / "mine").write_text("")
        monkeypatch.setattr(gguf, "_convert", lambda path, folder: (folder / "theirs").write_text(""))
        gguf.converted(path)  # the other one is done first

    monkeypatch.setattr(gguf, "_convert", convert)
    folder = gguf.converted(file)
    assert [entry.name for entry in folder.iterdir()] == ["theirs"]
    assert list(cache.iterdir()) == [folder]


def test_nothing_half_converted_is_left(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("")
        raise ModelError("no")

    monkeypatch.setattr(gguf, "_convert", fail)
    with pytest.raises(ModelError, match="no"):
        gguf.converted(file)
    assert not list(cache.iterdir())


def test_adapters_on_a_file_find_it_again(file: Path, tmp_path: Path, conversions: list[Path], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Nugget2D.from_base("lm.gguf", lora_rank=2)
    model.save_pretrained("adapters", base=False)
    monkeypatch.chdir("/")
    assert Nugget2D.from_pretrained(tmp_path / "adapters").legacy_fingerprint == model.legacy_fingerprint


def test_what_is_no_model_is_refused(file: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*lm\.gguf"):
        Nugget2D.from_pretrained(file)
    assert not list(cache.iterdir())


def test_the_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install 'nugget2d\[gguf\]'"):
        Nugget2D.from_pretrained(file)


def test_a_cache_that_cannot_be_written_is_named(
    file: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUGGET2D_CACHE", str(file))
    with pytest.raises(OutputError, match="set NUGGET2D_CACHE to a folder"):
        Nugget2D.from_pretrained(file)


@pytest.mark.slow
def test_a_real_file_is_converted_and_answers(smollm2: Path, cache: Path) -> None:
    model = Nugget2D.from_pretrained(smollm2)
    assert model.lm.dtype == torch.float32
    (folder,) = cache.iterdir()
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()
    }
    question = [{"role": "user", "content": "What is the capital of Germany?"}]
    inputs = model.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.lm.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of Germany is Berlin."
    half = Nugget2D.from_pretrained(smollm2, dtype="auto")
    assert half.lm.dtype == torch.bfloat16
    assert half.fingerprint == model.fingerprint
    # an ordinary folder: the file is not needed any more
    moved = shutil.move(folder, cache / "moved")
    assert Nugget2D.from_pretrained(moved).fingerprint.model == model.fingerprint.model
