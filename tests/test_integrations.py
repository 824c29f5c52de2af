"""Other libraries read what nugget2d writes: transformers, peft, the hub."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from huggingface_hub import HfApi, ModelCard
from transformers import AutoConfig, AutoModel, pipeline

import tiny
from nugget2d import Nugget2D
from nugget2d.checkpoints.card import MARK
from nugget2d.checkpoints.resolve import find_compressor
from nugget2d.errors import InputError, OutputError
from nugget2d.integrations.transformers import Nugget2DConfig, register


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama: Nugget2D) -> Path:
    path = tmp_path_factory.mktemp("saved")
    llama.save_pretrained(path)
    return path


# ---- transformers ----


@pytest.mark.e2e
def test_nothing_is_registered_before_it_is_asked_for(folder: Path) -> None:
    code = f"""
import nugget2d.model, nugget2d.integrations.transformers as ours
from transformers import AutoModel
try:
    AutoModel.from_pretrained({str(folder)!r})
except ValueError as error:
    print(error)
ours.register()
ours.register()
print(type(AutoModel.from_pretrained({str(folder)!r})).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "`nugget2d`" in run.stdout
    assert run.stdout.splitlines()[-1] == "Nugget2D"


def test_auto_classes_load_a_folder(folder: Path, llama: Nugget2D) -> None:
    register()
    assert isinstance(AutoConfig.from_pretrained(folder), Nugget2DConfig)
    model = AutoModel.from_pretrained(folder)
    assert model.legacy_fingerprint == llama.legacy_fingerprint
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.lm.dtype == torch.bfloat16
    with pytest.raises(InputError, match="cannot be loaded with low_memory"):
        AutoModel.from_pretrained(folder, low_memory=True)


def test_the_bundled_model_is_such_a_folder() -> None:
    register()
    assert isinstance(AutoConfig.from_pretrained(find_compressor("nano")), Nugget2DConfig)


def test_the_pipeline_answers_as_the_model_does(folder: Path, llama: Nugget2D) -> None:
    register()
    pipe = pipeline("compressed-text-generation", model=str(folder), max_new_tokens=6, device="cpu")
    memory = llama.compress(tiny.TEXT, ratio=5)
    expected = [[{"generated_text": llama.generate("The dog", memory=memory, max_new_tokens=6)}]]
    short = "Seven sails were counted."
    expected.append([{"generated_text": llama.generate("", memory=llama.compress(short, ratio=5), max_new_tokens=6)}])
    question = {"context": tiny.TEXT, "prompt": "The dog"}
    assert pipe(question, ratio=5) == expected[0]
    assert pipe([question, short], ratio=5) == expected
    assert pipe({"context": memory, "prompt": "The dog"}) == expected[0]
    assert pipe(memory) == [{"generated_text": llama.generate("", memory=memory, max_new_tokens=6)}]
    longer = pipe(question, ratio=5, max_new_tokens=9)
    assert longer[0]["generated_text"].startswith(expected[0][0]["generated_text"])
    assert len(pipe(question, num_return_sequences=2, do_sample=True)) == 2
    with pytest.raises(InputError, match="`context` and `prompt`"):
        pipe({"prompt": "The dog"})
    # a model that is there already
    assert pipeline("compressed-text-generation", model=llama, max_new_tokens=6)(question, ratio=5) == expected[0]


# ---- peft ----


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_peft_reads_both_adapters(kind: str, tmp_path: Path) -> None:
    model = tiny.trained(kind, "lora")
    model.save_pretrained(tmp_path / "m")
    ids = tiny.random_ids(2, 12)
    outputs = {}
    for role in ("encoder", "decoder"):
        base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m" / "base")
        plain = base(ids).logits.detach()
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "m", subfolder=role).eval()
        with torch.no_grad():
            outputs[role] = adapted(ids).logits
        with torch.no_grad(), model.parameters_by_role.role(role) as _:
            torch.testing.assert_close(outputs[role], model.lm(ids).logits)
        assert not torch.allclose(outputs[role], plain, atol=1e-3)
        assert adapted.peft_config["default"].r == model.config.lora_rank
    assert not torch.allclose(outputs["encoder"], outputs["decoder"], atol=1e-3)
    assert Nugget2D.from_pretrained(tmp_path / "m").legacy_fingerprint == model.legacy_fingerprint


# ---- hub ----


def test_a_folder_has_a_card_that_the_hub_can_read(tmp_path: Path) -> None:
    model = tiny.make("llama", "lora")
    model.lm.config.name_or_path = "some-team/story-lm"
    model.save_pretrained(tmp_path, metrics={"accuracy_4x": 0.875, "lm_loss": 2.5, "profile_20x": [1.0]})
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == (
        "nugget2d",
        "other",
        "text-generation",
    )
    assert (card.data.base_model, card.data.base_model_relation) == ("some-team/story-lm", "adapter")
    assert "context-compression" in card.data.tags
    assert "one nugget in 4, teacher-forced | 0.875 |" in card.text
    assert "plain language model | 2.500 |" in card.text
    assert "profile" not in card.text
    # what the hub's own card tools write is still a card
    card.save(tmp_path / "again.md")
    assert ModelCard.load(tmp_path / "again.md").data.to_dict() == card.data.to_dict()


def test_a_card_of_ones_own_is_kept_and_ours_renewed(tmp_path: Path, llama: Nugget2D) -> None:
    path = tmp_path / "README.md"
    llama.save_pretrained(tmp_path, metrics={"accuracy_4x": 0.5})
    llama.save_pretrained(tmp_path)
    assert "0.5" not in path.read_text()
    mine = path.read_text().replace(MARK, "") + "Trained on letters."
    path.write_text(mine)
    llama.save_pretrained(tmp_path)
    assert path.read_text() == mine


def test_pushing_uploads_a_folder_that_loads(tmp_path: Path, llama: Nugget2D, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {}

    def create_repo(self, repo_id, *, private, exist_ok):
        calls["create"] = (repo_id, private, exist_ok, self.token)
        return type("Url", (), {"repo_id": "team/" + repo_id})

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        calls["upload"] = (repo_id, Nugget2D.from_pretrained(folder_path).legacy_fingerprint)
        assert (Path(folder_path) / "README.md").is_file()
        return "https://hub.example/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert llama.push_to_hub("story", private=True, token="t") == "https://hub.example/commit/1"
    assert calls == {"create": ("story", True, True, "t"), "upload": ("team/story", llama.legacy_fingerprint)}

    def refuse(*arguments, **options):
        raise OSError("no route to the hub")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(OutputError, match="cannot push to 'story': no route"):
        llama.push_to_hub("story")
