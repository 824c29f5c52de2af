"""Any causal LM is loaded as it is, and what needs a compressor is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from huggingface_hub import constants

import tiny
from nugget2d import Nugget2D
from nugget2d.checkpoints import resolve
from nugget2d.checkpoints.base import load_tokenizer
from nugget2d.errors import InputError, ModelError, OutputError
from nugget2d.integrations.transformers import register
from nugget2d.modeling.cache import gather_nuggets
from nugget2d.modeling.compatibility import as_cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "lm")


def save(folder: Path, seed: int = 0) -> Path:
    tiny.lm(seed=seed).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_plain_lm_is_its_weights_and_nothing_else(folder: Path) -> None:
    model, lm = Nugget2D.from_pretrained(folder), tiny.lm()
    assert not model.has_compressor
    assert (model.config.adapters, model.config.name, model.reader_digest) == ("none", str(folder), "")
    state = {name.removeprefix("parameters_by_role.lm."): tensor for name, tensor in model.state_dict().items()}
    assert state.keys() == lm.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in lm.state_dict().items())
    assert not model.small_parameters()
    ids = tiny.random_ids(1, 9)
    with torch.no_grad():
        wanted = lm(ids).logits
        for role in ("base", "decoder"):
            with model.parameters_by_role.role(role) as module:
                assert torch.equal(module(input_ids=ids).logits, wanted)
        assert torch.equal(model.decode(None, ids, prompt=None), wanted)
    assert model.generate("The dog", max_new_tokens=4)
    assert model.score("The dog looked up.") > 0


def test_a_plain_lm_reads_states_of_its_own(folder: Path) -> None:
    """What training-free methods build on: all states of a text read like the text."""
    model = Nugget2D.from_pretrained(folder)
    ids = tiny.random_ids(1, 20)
    cache = hf.DynamicCache(config=model.lm.config)
    with torch.no_grad():
        model.lm(input_ids=ids[:, :12], **as_cache(model.lm, cache))
        index = torch.arange(12)[None]
        nuggets = gather_nuggets(cache, index, torch.ones_like(index, dtype=torch.bool))
        read = model.decode(nuggets, ids[:, 12:], prompt=None, start=12)
        torch.testing.assert_close(read, model.lm(ids).logits[:, 12:], atol=1e-4, rtol=1e-4)


def test_what_needs_a_compressor_is_refused(folder: Path) -> None:
    model = Nugget2D.from_pretrained(folder)
    memory = model.compress("The dog looked up.", ratio=2)
    ids = tiny.random_ids(1, 9)
    for call in (
        lambda: model.compress("The dog looked up.", method="nugget2d"),
        lambda: model.reconstruct(memory),
        lambda: model.encode(ids, [9], [3]),
        lambda: model.token_scores(ids),
        lambda: model.prompt("continue", 1),
    ):
        with pytest.raises(ModelError, match="no trained compressor; use a training-free method, or train one"):
            call()


def test_a_plain_lm_is_saved_as_transformers_reads_it(folder: Path, tmp_path: Path, llama: Nugget2D) -> None:
    model = Nugget2D.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.lm.parameters(), strict=True))
    assert Nugget2D.from_pretrained(tmp_path / "again").fingerprint.model == model.fingerprint.model
    with pytest.raises(InputError, match="nothing but its base"):
        model.save_pretrained(tmp_path / "adapters", base=False)
    llama.save_pretrained(tmp_path / "compressor")
    with pytest.raises(OutputError, match="holds a compressor"):
        model.save_pretrained(tmp_path / "compressor")
    assert Nugget2D.from_pretrained(tmp_path / "compressor").has_compressor


def test_precision_is_what_was_asked_for(folder: Path) -> None:
    for dtype, wanted in (
        (torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.float32),
    ):
        assert Nugget2D.from_pretrained(folder, dtype=dtype).lm.dtype == wanted
    tiny.lm().to(torch.bfloat16).save_pretrained(folder)
    assert Nugget2D.from_pretrained(folder).lm.dtype == torch.float32
    assert Nugget2D.from_pretrained(folder, dtype="auto").lm.dtype == torch.bfloat16


def test_a_device_map_goes_before_the_device(folder: Path) -> None:
    """ "meta" is a device on every machine."""
    assert Nugget2D.from_pretrained(folder, device="meta").device.type == "meta"
    assert Nugget2D.from_pretrained(folder, device="meta", device_map={"": "cpu"}).device.type == "cpu"


def test_offloaded_weights_have_no_fingerprint(folder: Path) -> None:
    with pytest.raises(ModelError, match="offloaded"):
        _ = Nugget2D.from_pretrained(folder, device="meta").fingerprint


def test_names_that_are_no_model_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, reason in {
        "no-such-model": r"unknown model 'no-such-model': not bundled \(nano\)",
        "someone/unknown-model": "the hub cannot be asked",
        "./missing": "it cannot be a hub id",
        str(tmp_path / "missing.gguf"): "cannot read .*missing.gguf: No such file",
        str(tmp_path): "is no model: a compressor",
    }.items():
        with pytest.raises(ModelError, match=reason):
            Nugget2D.from_pretrained(name)
    with pytest.raises(InputError, match="is a plain language model, not a compressor"):
        Nugget2D.from_pretrained(folder, base=folder)


def test_a_compressor_is_no_base(tmp_path: Path, llama: Nugget2D) -> None:
    llama.save_pretrained(tmp_path)
    for name in ("nano", tmp_path):
        with pytest.raises(ModelError, match="is a compressor, not a base model"):
            Nugget2D.from_base(name)


def test_code_in_a_folder_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_code(folder, "config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    for load in (Nugget2D.from_pretrained, Nugget2D.from_base):
        with pytest.raises(ModelError, match=r"base model .* brings its own code") as caught:
            load(folder)
        assert "trust_remote_code" not in str(caught.value)
    assert not (folder / "ran").exists()


def test_code_of_a_tokenizer_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_code(folder, "tokenizer_config.json", {"AutoTokenizer": ["code.Theirs", None]}, tokenizer_class="Theirs")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    for load in (Nugget2D.from_pretrained, load_tokenizer):
        with pytest.raises(ModelError, match=r"tokenizer .* brings its own code"):
            load(folder)
    assert not (folder / "ran").exists()


class Runs:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickles_among_the_weights_are_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="other pickled objects in its weights") as caught:
        Nugget2D.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def bring_code(folder: Path, file: str, auto_map: dict[str, object], **fields: object) -> None:
    """Let a configuration name classes of a Python file that leaves another file when it runs."""
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    config = json.loads((folder / file).read_text()) | {"model_type": "theirs", "auto_map": auto_map} | fields
    (folder / file).write_text(json.dumps(config))


# ---- the hub, by what was downloaded before ----


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(hub: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Put a folder into the cache of downloads, as one revision of a repository."""
    repository = hub / f"models--{name.replace('/', '--')}"
    commit = revision.encode().hex().ljust(40, "0")[:40]
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


def test_a_hub_id_is_loaded_at_its_revision(hub: Path, tmp_path: Path) -> None:
    publish(hub, "team/lm", save(tmp_path / "one"))
    publish(hub, "team/lm", save(tmp_path / "two", seed=1), "v2")
    main, other = Nugget2D.from_pretrained("team/lm"), Nugget2D.from_pretrained("team/lm", revision="v2")
    assert (main.config.name, main.has_compressor) == ("team/lm", False)
    assert main.fingerprint.model == Nugget2D.from_pretrained(tmp_path / "one").fingerprint.model
    assert other.fingerprint.model == Nugget2D.from_pretrained(tmp_path / "two").fingerprint.model
    assert main.fingerprint != other.fingerprint
    assert main.loaded_weights.files and other.loaded_weights.files
    assert main.loaded_weights.folder != other.loaded_weights.folder
    with pytest.raises(ModelError, match="unknown model 'team/lm'"):
        Nugget2D.from_pretrained("team/lm", revision="v3")


def test_a_compressor_of_the_hub_is_loaded_at_its_revision(hub: Path, tmp_path: Path) -> None:
    register()
    for number, revision in enumerate(("main", "v2")):
        tiny.make("llama", "copies", seed=number).save_pretrained(tmp_path / revision)
        publish(hub, "team/compressor", tmp_path / revision, revision)
    for revision in ("main", "v2"):
        wanted = Nugget2D.from_pretrained(tmp_path / revision).legacy_fingerprint
        for load in (Nugget2D.from_pretrained, hf.AutoModel.from_pretrained):
            assert load("team/compressor", revision=revision).legacy_fingerprint == wanted


def test_a_token_reaches_every_download(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of the base of a compressor, whose revision is another repository's matter."""
    publish(hub, "team/lm", save(tmp_path / "lm"))
    compressor = Nugget2D.from_base("team/lm", lora_rank=2, scorer_layer=1)
    compressor.save_pretrained(tmp_path / "adapters", base=False)
    publish(hub, "team/adapters", tmp_path / "adapters", "v2")
    calls: list[tuple[str, object, object]] = []

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(repository: object, *arguments: object, **options: object) -> object:
            calls.append((str(repository), options.get("token"), options.get("revision")))
            return original(repository, *arguments, **options)

        monkeypatch.setattr(owner, name, call)

    watch(resolve, "hf_hub_download")
    watch(resolve, "snapshot_download")
    watch(hf.AutoModelForCausalLM, "from_pretrained")
    watch(hf.AutoTokenizer, "from_pretrained")
    Nugget2D.from_pretrained("team/adapters", revision="v2", token="secret")
    register()
    hf.AutoModel.from_pretrained("team/adapters", revision="v2", token="secret", device_map={"": "cpu"})
    assert {token for _, token, _ in calls} == {"secret"}
    assert {(name, revision) for name, _, revision in calls if name.startswith("team/")} == {
        ("team/adapters", "v2"),
        ("team/lm", None),
    }
