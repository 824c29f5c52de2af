"""The published form (arXiv 2310.02409, section 3): two adapters on a frozen base; their size, files, precision."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import InputError, ModelError

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", seed=0)


def save_base(folder: Path, seed: int) -> Path:
    tiny.lm(seed=seed).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def adapted(base: Path, **options: object) -> Nugget2D:
    """Adapters on the base in a folder, with weights as after training."""
    model = Nugget2D.from_base(base, lora_rank=4, scorer_layer=2, window=tiny.WINDOW, **options)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# ---- size ----


def test_the_parameters_on_a_llama_7b_are_those_published() -> None:
    """Two adapters of 25.2 M, a scorer of 16.8 M, 4,096 for each soft prompt; here also a second prompt and a flag."""
    with torch.device("meta"):
        lm = hf.LlamaForCausalLM(hf.LlamaConfig(dtype=torch.bfloat16))
        model = Nugget2D.from_base(lm, tiny.tokenizer())
    assert sum(p.numel() for p in lm.parameters() if not p.requires_grad) == 6_738_415_616
    assert (model.config.lora_rank, model.config.scorer_layer) == (32, 3)
    assert model.config.lora_targets == ("q_proj", "v_proj", "o_proj")

    def count(parameters) -> int:
        return sum(parameter.numel() for parameter in parameters)

    sets = model.parameters_by_role
    sizes = {
        "encoder": count(sets.encoder_parameters()),
        "decoder": count(sets.decoder_parameters()),
        "scorer": count(model.scorer.parameters()),
        "prompts": count(model.prompts.parameters()),
        "flag": model.flag.numel(),
    }
    adapter = 32 * 3 * 2 * 4096 * 32  # layers x (q, v, o) x (A, B) x width x rank
    assert sizes == {
        "encoder": adapter,
        "decoder": adapter,
        "scorer": 4096 * 4096 + 4096 + 4096 + 1,
        "prompts": 2 * 4096,
        "flag": 4096,
    }
    assert (round(adapter / 1e6, 1), round(sizes["scorer"] / 1e6, 1)) == (25.2, 16.8)
    assert count(p for p in model.parameters() if p.requires_grad) == sum(sizes.values())


@pytest.mark.parametrize("kind", ["gpt2", "opt", "neox", "phi3", "gemma3"])
def test_adapters_sit_on_attention_in_every_layer_and_nowhere_else(kind: str) -> None:
    model = tiny.make(kind, "lora")
    names = {name.split(".lora_A")[0] for name, _ in model.lm.named_parameters() if ".lora_A.encoder." in name}
    layers = model.lm.config.num_hidden_layers
    assert len(names) == layers * len(model.config.lora_targets)
    assert all("attn" in name or "attention" in name for name in names)


# ---- files ----


def test_adapters_alone_come_back_onto_their_base(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = adapted(Path("base"))
    model.save_pretrained("adapters", base=False)
    own = load_file("adapters/nugget2d.safetensors")
    for role in ("encoder", "decoder"):
        for name, tensor in load_file(f"adapters/{role}/adapter_model.safetensors").items():
            name = name.replace("base_model.model.", "parameters_by_role.lm.")
            own[name.replace(".weight", f".{role}.weight")] = tensor
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: t.shape for name, t in own.items()} == {name: p.shape for name, p in trainable.items()}
    assert not Path("adapters/base").exists()
    assert json.loads(Path("adapters/decoder/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    monkeypatch.chdir("/")  # the base is found from anywhere
    again = Nugget2D.from_pretrained(tmp_path / "adapters")
    assert again.legacy_fingerprint == model.legacy_fingerprint
    memory = model.compress(tiny.TEXT[:200], ratio=4)
    assert again.reconstruct(memory) == model.reconstruct(memory)


def test_a_base_that_moved_is_named_and_another_one_refused(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapters", base=False)
    moved = tmp_path / "moved"
    shutil.move(base, moved)
    with pytest.raises(ModelError, match="say where that is with base="):
        Nugget2D.from_pretrained(tmp_path / "adapters")
    assert Nugget2D.from_pretrained(tmp_path / "adapters", base=moved).legacy_fingerprint == model.legacy_fingerprint
    with pytest.raises(ModelError, match="trained on another base"):
        Nugget2D.from_pretrained(tmp_path / "adapters", base=save_base(tmp_path / "other", seed=1))
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match="has its own base"):
        Nugget2D.from_pretrained(tmp_path / "whole", base=moved)
    (tmp_path / "adapters" / "base.json").write_text('{"name": 3}')
    with pytest.raises(ModelError, match="damaged"):
        Nugget2D.from_pretrained(tmp_path / "adapters")


def test_a_folder_written_twice_is_what_was_written_last(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    model.save_pretrained(tmp_path / "m", base=False)
    model.save_pretrained(tmp_path / "m")
    shutil.rmtree(base)
    assert Nugget2D.from_pretrained(tmp_path / "m").legacy_fingerprint == model.legacy_fingerprint


def test_what_has_no_base_to_come_back_to_is_saved_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not loaded from a folder or hub id"):
        tiny.make("llama", "lora").save_pretrained(tmp_path / "m", base=False)
    with pytest.raises(InputError, match="it is the decoder"):
        tiny.make("llama", "copies").save_pretrained(tmp_path / "m", base=False)
    assert not (tmp_path / "m").exists()


# ---- precision ----


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3"])
def test_adapters_train_in_full_precision_on_a_half_precision_base(kind: str, tmp_path: Path) -> None:
    tiny.lm(kind).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        trained = "lm." not in name or "lora_" in name
        assert (parameter.dtype, parameter.requires_grad) == (torch.float32 if trained else torch.bfloat16, trained)
    ids = tiny.random_ids(2, 20)
    encoded = model.encode(ids, [20, 20], [5, 5])
    model.decode(encoded.nuggets, ids, prompt="reconstruct").float().logsumexp(-1).sum().backward()
    for parameters in (model.parameters_by_role.decoder_parameters(), model.scorer.hidden.parameters()):
        assert all(p.grad.abs().sum() > 0 for p in parameters)
    memory = model.compress(tiny.TEXT[:50], ratio=4)
    assert memory.dtype == "bfloat16"
    # a memory is read by the same model in any precision
    model.save_pretrained(tmp_path / "adapters", base=False)
    full = Nugget2D.from_pretrained(tmp_path / "adapters")
    half = Nugget2D.from_pretrained(tmp_path / "adapters", dtype=torch.bfloat16)
    assert (full.lm.dtype, half.lm.dtype) == (torch.float32, torch.bfloat16)
    assert half.reconstruct(memory) == model.reconstruct(memory)
    assert half.score("The dog.", memory=memory) == model.score("The dog.", memory=memory)
    assert full.score("The dog.", memory=memory) == pytest.approx(half.score("The dog.", memory=memory), rel=0.1)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_without_its_library_says_so(base: Path) -> None:
    with pytest.raises(ModelError, match="bitsandbytes"):
        Nugget2D.from_base(base, quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True))


def test_copies_of_quantized_weights_are_refused(base: Path) -> None:
    with pytest.raises(InputError, match="cannot be trained"):
        Nugget2D.from_base(base, adapters="copies", quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True))
