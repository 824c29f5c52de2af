"""Which memories belong to which model: digests of every weight, and the cache that spares computing them again."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import MismatchError
from nugget2d.memory.fingerprint import Fingerprint
from nugget2d.modeling import digest_cache
from nugget2d.modeling.digest import sampled_digest, weights_digest

# wide enough that a sample leaves out most numbers of a matrix
WIDE = {"hidden_size": 64, "intermediate_size": 128}
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUGGET2D_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / digest_cache.CACHE_FILE


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every digest that is computed over all weights."""
    calls: list[int] = []

    def count(state: dict[str, torch.Tensor]) -> str:
        calls.append(len(state))
        return weights_digest(state)

    monkeypatch.setattr(digest_cache, "weights_digest", count)
    return calls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.lm(**WIDE).save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def digest(folder: Path, **options: object) -> str:
    return Nugget2D.from_pretrained(folder, **options).fingerprint.model


def change_one_weight(folder: Path) -> None:
    """Another second byte, the higher one of a bfloat16, of one number that a sample does not look at."""
    weights = load_file(folder / "model.safetensors")
    before = sampled_digest(weights)
    weights[WEIGHT].flatten()[1] += 1.0
    assert sampled_digest(weights) == before
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_one_changed_weight_is_another_model(folder: Path) -> None:
    before = digest(folder)
    change_one_weight(folder)
    assert digest(folder) != before


def test_a_digest_covers_names_shapes_and_numbers() -> None:
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    others = [
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"].view(2, 3), "b": state["b"]},
        {"a": state["b"], "b": state["a"]},
        {"a": state["a"]},
        {"a": state["a"].flip(0), "b": state["b"]},
        {"a": state["a"].int(), "b": state["b"]},
    ]
    assert len({weights_digest(one) for one in (state, *others)}) == len(others) + 1
    square = torch.arange(9.0).view(3, 3)  # one address, two matrices
    assert weights_digest({"a": square, "b": square.T}) == weights_digest({"a": square, "b": square.T.contiguous()})
    assert weights_digest({"a": square, "b": square}) != weights_digest({"a": square, "b": square.T})


def test_everybodys_wrapper_of_one_lm_shares_its_fingerprint(folder: Path) -> None:
    plain = Nugget2D.from_pretrained(folder)
    wrappers = []
    for seed, adapters in enumerate(("lora", "lora", "copies")):
        torch.manual_seed(seed)
        wrappers.append(Nugget2D.from_base(folder, adapters=adapters, lora_rank=2 + seed, scorer_layer=1))
    assert {model.fingerprint for model in wrappers} == {plain.fingerprint}
    assert plain.fingerprint.scheme == 2
    assert len({model.legacy_fingerprint.model for model in wrappers}) == 3
    torch.manual_seed(0)
    lm = tiny.lm(**WIDE)
    assert Nugget2D.from_base(lm, tiny.tokenizer(), lora_rank=2).fingerprint.model == plain.fingerprint.model


@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
def test_readers_differ_by_what_reads(adapters: str) -> None:
    def reader(change: str = "") -> str:
        model = tiny.trained("llama", adapters)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if change and change in name:
                    parameter.add_(1)
        return model.reader_digest

    assert reader() == reader("scorer") == reader("flag") == reader(".encoder.") != ""
    assert reader("prompts.continue") != reader()
    if adapters == "lora":
        assert reader(".lora_A.decoder.") != reader()
        assert reader(".lora_B.decoder.") != reader()


def test_precisions_agree(folder: Path, tmp_path: Path) -> None:
    full = digest(folder)
    assert digest(folder, dtype="bfloat16") == full
    Nugget2D.from_pretrained(folder).save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert digest(tmp_path / "half") == full


def test_memories_are_read_by_whoever_has_what_they_need(folder: Path) -> None:
    plain = Nugget2D.from_pretrained(folder)
    one, other = (Nugget2D.from_base(folder, lora_rank=2, scorer_layer=1) for _ in range(2))
    with torch.no_grad():
        other.prompts["continue"].add_(1)
    text = "The dog looked up as if it had counted too."
    free = plain.compress(text, method="knorm", ratio=2)
    assert (
        plain.score(" Seven.", memory=free) == one.score(" Seven.", memory=free) == other.score(" Seven.", memory=free)
    )
    trained = one.compress(text, method="nugget2d", ratio=2)
    assert one.score(" Seven.", memory=trained) > 0
    for reader in (plain, other):
        with pytest.raises(MismatchError, match="made for the adapters of"):
            reader.score(" Seven.", memory=trained)


# ---- old files ----


def test_old_memories_go_by_all_weights(llama: Nugget2D) -> None:
    """Of version 0.1: the fingerprint has no scheme, and the compressor's own weights count."""
    memory = llama.compress("The dog looked up.", ratio=2)
    old = Fingerprint("old", llama.legacy_fingerprint.model, llama.legacy_fingerprint.tokenizer)
    object.__setattr__(memory, "fingerprint", old)
    memory = Memory.from_bytes(memory.to_bytes(), "memory")
    llama.require(memory)
    other = tiny.trained("llama", "copies")
    with torch.no_grad():
        other.flag.add_(1)
    with pytest.raises(MismatchError, match="made by model 'old'"):
        other.require(memory)


@pytest.mark.parametrize("scheme", [1, 2])
def test_weights_and_tokenizer_must_both_fit_and_names_need_not(llama: Nugget2D, scheme: int) -> None:
    own = llama.legacy_fingerprint if scheme == 1 else llama.fingerprint
    assert llama.recognizes(Fingerprint("other name", own.model, own.tokenizer, scheme))
    assert not llama.recognizes(Fingerprint(own.name, own.model[::-1], own.tokenizer, scheme))
    assert not llama.recognizes(Fingerprint(own.name, own.model, own.tokenizer[::-1], scheme))
    assert not llama.recognizes(Fingerprint(own.name, own.model, own.tokenizer, 3 - scheme))


# ---- the cache ----


def test_unchanged_files_are_hashed_once(folder: Path, hashed: list[int], cache: Path) -> None:
    first = digest(folder)
    assert len(hashed) == 1
    assert digest(folder) == digest(folder, dtype="bfloat16") == first
    assert Nugget2D.from_base(folder, lora_rank=2).fingerprint.model == first
    assert len(hashed) == 1
    assert digest(folder, dtype="float16")  # rounds otherwise
    assert len(hashed) == 2
    assert list(json.loads(cache.read_text())) == [str(folder)]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_touched_file_is_hashed_again(folder: Path, hashed: list[int], file: str) -> None:
    first = digest(folder)
    os.utime(folder / file, ns=(0, 1))
    assert digest(folder) == first
    assert len(hashed) == 2
    data = (folder / file).read_bytes()
    state = (folder / file).stat()
    (folder / file).rename(folder / "old")  # holds the inode
    (folder / file).write_bytes(data)
    os.utime(folder / file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest(folder) == first
    assert len(hashed) == 3


def test_a_compressor_has_the_digest_of_its_base_folder(folder: Path, tmp_path: Path, hashed: list[int]) -> None:
    Nugget2D.from_base(folder, lora_rank=2).save_pretrained(tmp_path / "m")
    first = Nugget2D.from_pretrained(tmp_path / "m").fingerprint.model
    assert Nugget2D.from_pretrained(tmp_path / "m").fingerprint.model == first == digest(folder)
    assert len(hashed) == 2


@pytest.mark.parametrize("adapters", ["none", *tiny.ADAPTERS])
def test_weights_changed_in_memory_are_hashed_as_they_are(folder: Path, cache: Path, adapters: str) -> None:
    def load() -> Nugget2D:
        if adapters == "none":
            return Nugget2D.from_pretrained(folder)
        return Nugget2D.from_base(folder, adapters=adapters, lora_rank=2)

    def weight(model: Nugget2D) -> torch.nn.Parameter:
        return next(p for name, p in model.lm.named_parameters() if name == WEIGHT)

    before = load().fingerprint.model
    kept = cache.read_bytes()
    changed = load()
    with torch.no_grad():
        weight(changed)[0, 1] += 1  # one number, which no sample sees
    everywhere = load()
    weight(everywhere).data += 1  # by way of .data, which no counter sees
    replaced = load()
    mlp = replaced.lm.model.layers[1].mlp
    mlp.up_proj.weight = torch.nn.Parameter(weight(changed).detach().clone())
    assert changed.fingerprint.model == replaced.fingerprint.model != before
    assert cache.read_bytes() == kept  # nor do they get into the cache
    assert everywhere.fingerprint.model not in (before, changed.fingerprint.model)
    assert load().fingerprint.model == before


def test_a_file_changed_while_it_is_read_is_not_taken_for_what_was_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_change(module: torch.nn.Module, *_: object, **__: object) -> tuple[tuple[int, object], ...]:
        change_one_weight(folder)
        return digest_cache.tensor_versions(module)

    with monkeypatch.context() as patch:
        patch.setattr("nugget2d.checkpoints.base.tensor_versions", then_change)
        before = digest(folder)
    assert digest(folder) != before


def test_models_moved_or_loaded_for_inference_have_the_same(folder: Path) -> None:
    with torch.inference_mode():
        inference = Nugget2D.from_pretrained(folder).fingerprint
    model = Nugget2D.from_pretrained(folder)
    assert model.to(torch.bfloat16).fingerprint == inference


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"FOLDER": 3}', b'{"FOLDER": {"digest": "x"}}'])
def test_a_damaged_cache_is_as_good_as_none(folder: Path, cache: Path, hashed: list[int], content: bytes) -> None:
    first = digest(folder)
    cache.write_bytes(content.replace(b"FOLDER", str(folder).encode()))
    assert digest(folder) == first
    assert len(hashed) == 2
    assert digest(folder) == first
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_kept_is_done_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    first = digest(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUGGET2D_CACHE", str(tmp_path / "file"))
    assert digest(folder) == first
    monkeypatch.delenv("NUGGET2D_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert digest(folder) == first
    assert len(hashed) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert digest(folder) == first
    assert (tmp_path / "shared" / "nugget2d" / digest_cache.CACHE_FILE).is_file()
