"""What `nugget2d doctor` finds on machines and models, and what it prints."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import tiny
from nugget2d.cli.app import app
from nugget2d.inspection import doctor
from nugget2d.inspection.doctor import Finding, examine


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save(tmp_path / "base", tiny.lm("qwen2"))


def save(folder: Path, lm: hf.PreTrainedModel) -> str:
    lm.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_model_that_works() -> None:
    report = examine("nano", [1000])
    assert report.usable
    model = by_name(report.model)
    assert model["model"] == Finding("model", "nano")
    assert model["reads nuggets exactly"].value == "yes"
    assert model["positions"].value == "no limit"
    machine = by_name(report.machine)
    assert torch.__version__ in machine["libraries"].value
    assert machine["threads"].value.startswith("1 on ")


def test_sizes_are_those_of_memories(folder: str) -> None:
    (size,) = examine(folder, [130]).sizes
    model = tiny.make("qwen2", window=256)
    text = "a" * 130
    for (ratio, dtype), nbytes in size.nuggets.items():
        memory = model.compress(text, ratio=ratio, dtype=dtype)
        assert (memory.num_tokens, memory.full_nbytes, memory.nbytes) == (130, size.full, nbytes)
    assert len(size.nuggets) == 4


def test_a_base_is_told_from_a_compressor(folder: str) -> None:
    report = examine(folder, [])
    assert report.usable
    assert "nugget2d train" in by_name(report.model)["model"].remedy


@pytest.mark.parametrize(
    "kind, changes, name, value",
    [
        ("gpt2", {}, "joining segments", "to reconstruct only"),
        ("gpt2", {}, "positions", "1,024"),
        ("gemma3", {"sliding_window": 64}, "positions", "64"),
        ("gemma3", {"sliding_window": 64}, "segments", "up to 32 tokens, joined to contexts of 64"),
    ],
)
def test_limits_are_named(kind: str, changes: dict, name: str, value: str, tmp_path: Path) -> None:
    report = examine(save(tmp_path / "base", tiny.lm(kind, **changes)), [])
    assert report.usable
    assert by_name(report.model)[name].value.startswith(value)


def test_what_cannot_be_used_is_a_finding_with_the_reason(tmp_path: Path) -> None:
    lm = tiny.lm(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    for name, reason in (
        (save(tmp_path / "dynamic", lm), "dynamic rotary embeddings"),
        ("no-such-model", "unknown model"),
        (str(tmp_path), "is no model"),
    ):
        report = examine(name, [1000])
        assert not report.usable
        assert reason in report.model[0].remedy
        assert not report.sizes


def test_a_model_that_misreads_nuggets_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local attention counts cache entries; with the check at load out of the way, measuring alone must tell."""
    shape = {"vocab_size": len(tiny.tokenizer()), "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 8, "initializer_range": 0.2}
    lm = hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**shape, **local))
    monkeypatch.setattr("nugget2d.modeling.network.check_supported", lambda lm, config: None)
    report = examine(save(tmp_path / "base", lm), [])
    assert not report.usable
    assert "off by" in by_name(report.model)["reads nuggets exactly"].value


def test_more_threads_than_cores_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 10_000)
    assert "OMP_NUM_THREADS" in by_name(doctor._machine_findings())["threads"].remedy


def test_a_missing_extra_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nugget2d.inspection.doctor.util.find_spec", lambda name: None)
    extras = [finding for finding in doctor._machine_findings() if finding.value == "not installed"]
    assert [finding.remedy for finding in extras] == [
        "pip install 'nugget2d[bench]'",
        "pip install 'nugget2d[gguf]'",
        "pip install 'bitsandbytes'",
    ]


def test_the_command_prints_and_exits_by_what_it_finds(folder: str) -> None:
    good = CliRunner().invoke(app, ["doctor", folder, "--tokens", "1234"], terminal_width=200)
    assert good.exit_code == 0, good.output
    (size,) = examine(folder, [1234]).sizes
    for number in (1234, size.full, *size.nuggets.values()):
        assert f"{number:,}" in good.stdout
    bad = CliRunner().invoke(app, ["doctor", "no-such-model"], terminal_width=200)
    assert bad.exit_code == 1
    assert "unknown model" in bad.stdout
    assert "libraries" in bad.stdout
    assert CliRunner().invoke(app, ["doctor", "--tokens", "0"]).exit_code == 2
