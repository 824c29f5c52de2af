"""Memory files: a damaged one is refused, a failed write leaves nothing behind."""

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, MemoryFileError, MismatchError, OutputError
from nugget2d.files import atomic_write, decode_text, read_text


@pytest.fixture(scope="module", params=["float32", "int8"])
def stored(request, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("memory") / "a.nugget"
    tiny.trained().compress(tiny.TEXT[:200], ratio=8, exact=True, dtype=request.param).save(path)
    return path.read_bytes()


def refused(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    for read in (Memory.map, Memory.load):
        with pytest.raises(MemoryFileError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    return str(caught.value)


def test_truncated_anywhere_is_refused(stored: bytes, tmp_path: Path) -> None:
    sizes = {*range(0, 64), *range(0, len(stored), 61), *range(len(stored) - 16, len(stored))}
    for size in sizes:
        refused(stored[:size], tmp_path / "cut.nugget")


@pytest.mark.slow
def test_any_flipped_bit_is_refused(stored: bytes, tmp_path: Path) -> None:
    chance = random.Random(0)
    header = 8 + int.from_bytes(stored[:8], "little")
    offsets = [*range(0, header, 3), *(chance.randrange(header, len(stored)) for _ in range(300))]
    for offset in offsets:
        damaged = bytearray(stored)
        damaged[offset] ^= 1 << chance.randrange(8)
        refused(bytes(damaged), tmp_path / "flipped.nugget")


def test_appended_bytes_are_refused(stored: bytes, tmp_path: Path) -> None:
    refused(stored + b"\0", tmp_path / "long.nugget")
    refused(stored + stored, tmp_path / "twice.nugget")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    for data in (
        b"",
        b"{}",
        b"plain text, quite long enough to have a header",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        bytes(64),
    ):
        assert "not a memory" in refused(data, path)
    save_file({"a": torch.zeros(3)}, path)
    assert "not a memory" in refused(path.read_bytes(), path)
    for read in (Memory.map, Memory.load):
        with pytest.raises(MemoryFileError, match="No such file"):
            read(tmp_path / "missing")
        with pytest.raises(MemoryFileError, match="directory"):
            read(tmp_path)


def test_a_newer_version_is_named(stored: bytes, tmp_path: Path) -> None:
    assert stored.count(b'"version":"2"') == 1
    assert "version 3" in refused(stored.replace(b'"version":"2"', b'"version":"3"'), tmp_path / "new.nugget")


def test_another_models_memory_is_refused_by_name(llama: Nugget2D) -> None:
    other = tiny.trained("llama", "copies", seed=9, name="other")
    memory = other.compress("The dog.", ratio=2)
    for read in (llama.reconstruct, lambda m: llama.generate("a", memory=m), lambda m: llama.score("a", memory=m)):
        with pytest.raises(MismatchError, match=r"'other'.*'LlamaForCausalLM'"):
            read(memory)
    with pytest.raises(MismatchError):
        Memory.join([memory, llama.compress("The dog.", ratio=2)])


def test_fingerprints_tell_models_apart() -> None:
    models = [
        tiny.make("llama", "copies"),
        tiny.make("llama", "lora"),
        tiny.trained("llama", "lora"),
        tiny.make("qwen2"),
    ]
    assert len({model.legacy_fingerprint.model for model in models}) == len(models)
    assert tiny.make("llama", "copies").legacy_fingerprint == models[0].legacy_fingerprint
    # the first three are one LM
    assert models[0].fingerprint == models[1].fingerprint == models[2].fingerprint != models[3].fingerprint


def test_bad_joins_and_dtypes_are_refused(llama: Nugget2D) -> None:
    a, b = (llama.compress("The dog.", ratio=2, dtype=dtype) for dtype in ("float32", "int8"))
    with pytest.raises(InputError, match=r"\.to\(\)"):
        Memory.join([a, b])
    with pytest.raises(InputError, match="empty list"):
        Memory.join([])
    with pytest.raises(InputError, match="unknown dtype 'int4'"):
        a.to("int4")


# ---- writing ----


def test_an_existing_file_needs_force(llama: Nugget2D, tmp_path: Path) -> None:
    path = tmp_path / "a.nugget"
    path.write_text("precious")
    memory = llama.compress("The dog.", ratio=2)
    with pytest.raises(OutputError, match="exists"):
        memory.save(path, force=False)
    assert path.read_text() == "precious"
    memory.save(path, force=True)
    assert Memory.load(path).num_tokens == memory.num_tokens


@pytest.mark.parametrize("existing", [None, b"precious"])
def test_a_full_disk_leaves_what_was_there(
    llama: Nugget2D, tmp_path: Path, monkeypatch, existing: bytes | None
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.nugget"
    if existing is not None:
        path.write_bytes(existing)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        llama.compress("The dog.", ratio=2).save(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if existing is None else [existing])


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("precious")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


def test_impossible_outputs_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "a", Path(os.devnull), tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match="cannot write"), atomic_write(path):
            pass
    assert not list(tmp_path.iterdir())


# ---- reading text ----


def test_text_is_read_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\r\nb\x00\ufeff€".encode())
    assert read_text(path) == "a\r\nb\x00\ufeff€"
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "missing")
    with pytest.raises(InputError, match="byte 2"):
        decode_text(b"ab\xff", "stdin")
    with pytest.raises(InputError, match="stdin is empty"):
        decode_text(b"", "stdin")
