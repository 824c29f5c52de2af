"""peft adapters that others made are refused with the remedy; never does a model compute as the base alone."""

from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from huggingface_hub import constants

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import InputError, ModelError
from nugget2d.inspection.doctor import examine
from nugget2d.integrations.transformers import register

CONFIG = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
REMEDY = r"peft adapter.*merge_and_unload\(\)\.save_pretrained"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.lm().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """What people have on disk: adapter_config.json names the base, the tokenizer lies beside it."""
    adapted(base).save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def adapted(base: Path) -> peft.PeftModel:
    return peft.get_peft_model(hf.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**CONFIG))


@pytest.mark.parametrize("load", [Nugget2D.from_pretrained, Nugget2D.from_base])
def test_folders_are_refused(adapter: Path, base: Path, tmp_path: Path, load) -> None:
    with pytest.raises(ModelError, match=REMEDY):
        load(adapter)
    # with a whole model beside it: transformers would load both
    tiny.lm().save_pretrained(adapter)
    with pytest.raises(ModelError, match=REMEDY):
        load(adapter)


def test_the_base_of_a_compressor_is_none_either(adapter: Path, base: Path, tmp_path: Path) -> None:
    Nugget2D.from_base(base, lora_rank=2).save_pretrained(tmp_path / "m", base=False)
    with pytest.raises(ModelError, match=REMEDY):
        Nugget2D.from_pretrained(tmp_path / "m", base=adapter)
    Nugget2D.from_base(base, lora_rank=2).save_pretrained(tmp_path / "whole")
    for file in adapter.glob("adapter_*"):
        (tmp_path / "whole" / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=REMEDY):
        Nugget2D.from_pretrained(tmp_path / "whole")


def test_one_half_of_a_compressor_is_an_adapter(base: Path, tmp_path: Path) -> None:
    Nugget2D.from_base(base, lora_rank=2).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=REMEDY):
        Nugget2D.from_pretrained(tmp_path / "m" / "decoder")


def test_repositories_are_refused(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--team--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    adapter.rename(repository / "snapshots" / ("0" * 40))
    for load in (Nugget2D.from_pretrained, Nugget2D.from_base):
        with pytest.raises(ModelError, match=r"'team/adapter' is a " + REMEDY):
            load("team/adapter")


def injected(base: Path) -> hf.PreTrainedModel:
    return peft.inject_adapter_in_model(peft.LoraConfig(**CONFIG), hf.AutoModelForCausalLM.from_pretrained(base))


def merged_but_not_unloaded(base: Path) -> hf.PreTrainedModel:
    model = adapted(base)
    model.merge_adapter()
    return model.get_base_model()


def prompt_tuned(base: Path) -> peft.PeftModel:
    lm = hf.AutoModelForCausalLM.from_pretrained(base)
    return peft.get_peft_model(lm, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def inside_attention(base: Path) -> hf.PreTrainedModel:
    lm = hf.AutoModelForCausalLM.from_pretrained(base)
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    return peft.get_peft_model(lm, config).get_base_model()


@pytest.mark.parametrize(
    "make",
    [
        adapted,
        lambda base: adapted(base).get_base_model(),
        prompt_tuned,
        injected,
        merged_but_not_unloaded,
        inside_attention,
        lambda base: Nugget2D.from_base(base, lora_rank=2).lm,
    ],
    ids=["PeftModel", "the LM in it", "prompt tuning", "injected", "merged", "in attention", "our own"],
)
def test_objects_are_refused(base: Path, make) -> None:
    with pytest.raises(ModelError, match=REMEDY):
        Nugget2D.from_base(make(base), tiny.tokenizer())


def test_other_objects_are_refused(base: Path) -> None:
    with pytest.raises(InputError, match="takes a model of transformers"):
        Nugget2D.from_base(torch.nn.Linear(2, 2), tiny.tokenizer())


def test_the_remedy_works(adapter: Path, base: Path, tmp_path: Path) -> None:
    lm = hf.AutoModelForCausalLM.from_pretrained(base)
    ids = tiny.random_ids(1, 8)
    with torch.no_grad():
        plain = lm(ids).logits
        model = peft.PeftModel.from_pretrained(lm, adapter).eval()
        wanted = model(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        got = Nugget2D.from_pretrained(tmp_path / "merged").lm(ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)


def test_a_pipeline_does_not_take_its_base(adapter: Path) -> None:
    """transformers loads the base that an adapter names, and no more than its body."""
    register()
    with pytest.raises(ModelError, match=r"needs a Nugget2D.*LlamaModel.*Nugget2D\.from_pretrained"):
        hf.pipeline("compressed-text-generation", model=str(adapter))


def test_a_base_that_cannot_be_written_is_reported(base: Path, tmp_path: Path) -> None:
    lm = hf.AutoModelForCausalLM.from_pretrained(base)
    lm.generation_config.temperature = 0.5  # without do_sample, transformers refuses to write it
    model = Nugget2D.from_base(lm, tiny.tokenizer(), adapters="copies")
    with pytest.raises(InputError, match=r"does not write this LlamaForCausalLM[\s\S]*generation_config"):
        model.save_pretrained(tmp_path / "m")


def test_the_doctor_says_so(adapter: Path) -> None:
    report = examine(str(adapter), [])
    assert not report.usable
    assert "merge_and_unload()" in report.model[0].remedy
