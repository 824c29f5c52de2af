"""The rate-distortion benchmark: its arithmetic on made-up numbers, its runs on a tiny model."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny
from cli_fixtures import save_tiny_model
from nugget2d import Nugget2D
from nugget2d.cli.app import app
from nugget2d.errors import InputError
from nugget2d.evaluation import distortion_run
from nugget2d.evaluation.coding import coder_bits
from nugget2d.evaluation.continuation import lm_losses, memory_losses, no_memory_losses
from nugget2d.evaluation.distortion import (
    Reference,
    describe_reference,
    measure_cell,
    measure_reference,
    retained,
)
from nugget2d.evaluation.distortion_run import Settings, run_distortion
from nugget2d.evaluation.distortion_tables import markdown
from nugget2d.evaluation.fidelity import bleu, bleu_counts, bleu_of_counts
from nugget2d.evaluation.intervals import estimate
from nugget2d.evaluation.teacher_forced import read_back, reconstruction_hits
from nugget2d.evaluation.windows import Window, sample_windows
from nugget2d.text.segmentation import tokenize

IDS = tokenize(tiny.tokenizer(), tiny.TEXT)[0]


def windows(count: int = 3, length: int = 16, target: int = 8) -> list[Window]:
    return sample_windows(tiny.tokenizer(), [IDS], count, length, target=target)


# ---- intervals ----


def test_intervals_cover_a_known_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(80):
        sample = generator.exponential(2.0, size=40)
        figure = estimate(np.stack([sample, np.ones_like(sample)], axis=1), seed=seed)
        assert figure["low"] < figure["value"] < figure["high"]
        assert figure["value"] == pytest.approx(sample.mean(), abs=1e-6)
        covered += figure["low"] <= 2 <= figure["high"]
    assert 0.85 <= covered / 80 < 1


def test_pairing_makes_differences_sure() -> None:
    """Windows differ by nats, the losses of one window by a tenth: unpaired, the interval would cover anything."""
    base = np.random.default_rng(0).normal(5, 2, size=50)
    rows = np.stack([base, base - 0.05, base - 0.1], axis=1)
    figure = estimate(rows, retained)
    assert figure == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_one_window_has_no_interval() -> None:
    assert estimate([[3, 2]]) == {"value": 1.5, "low": None, "high": None}


def test_intervals_are_seeded() -> None:
    rows = [[value, 1] for value in range(20)]
    assert estimate(rows, seed=1) == estimate(rows, seed=1) != estimate(rows, seed=2)


# ---- metrics ----


def test_bleu_of_counts_is_corpus_bleu() -> None:
    references = ["the lamp was lit at dusk , and the keeper wrote it down", "nothing else happened that night at all"]
    hypotheses = ["the lamp was lit at dawn , and the keeper wrote it", "nothing else happened that night at sea"]
    sums = np.array([np.sum(bleu_counts(hypotheses, references), axis=0)] * 2)
    assert bleu_of_counts(sums).tolist() == pytest.approx([bleu(hypotheses, references)] * 2)


def test_coders_learn_from_one_text_for_the_next() -> None:
    text = "a text that comes again and again "
    bits = coder_bits([text] * 20)
    assert bits["xz_stream"] < bits["xz_each"] and bits["zstd_stream"] < bits["zstd_each"]
    size = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert bits["xz_each"] == pytest.approx(8 * size / len(text), abs=1e-3)


def test_nothing_is_retained_of_a_context_that_does_not_help() -> None:
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    useless = Reference(none=5 + noise, full=5 + noise.roll(1, 0), no_memory=5 + noise)
    useful = Reference(none=5 + noise, full=4 + noise, no_memory=4.75 + noise)
    chosen = windows(1) * 40
    assert describe_reference(chosen, useless)["no_memory_retained"] is None
    described = describe_reference(chosen, useful)
    assert described["context_helps"] and described["context_gain"]["value"] == pytest.approx(1, abs=1e-5)
    assert described["no_memory_retained"]["value"] == pytest.approx(0.25, abs=1e-5)


# ---- windows ----


def test_windows_are_apart_and_tokenize_to_themselves() -> None:
    taken: set[int] = set()
    for window in sample_windows(tiny.tokenizer(), [IDS], None, 16, target=8):
        assert tokenize(tiny.tokenizer(), window.text)[0] == window.ids and len(window.ids) == 16
        both = window.ids + window.target
        start = next(s for s in range(len(IDS)) if IDS[s : s + 24] == both)
        assert not taken & set(range(start, start + 24))
        taken |= set(range(start, start + 24))
    assert len(taken) == 24 * (len(IDS) // 24)


def test_documents_take_turns() -> None:
    halves = [IDS[:150], IDS[:10], IDS[150:300]]
    first, second, third = sample_windows(tiny.tokenizer(), halves, 3, 16)
    where = ["".join(map(chr, half)) for half in halves]
    assert "".join(map(chr, first.ids)) in where[0] and "".join(map(chr, third.ids)) in where[0]
    assert "".join(map(chr, second.ids)) in where[2]
    assert sample_windows(tiny.tokenizer(), halves, 2, 16) == [first, second]
    with pytest.raises(InputError, match="only 2 separate windows of 100"):
        sample_windows(tiny.tokenizer(), halves, 3, 100)


# ---- measuring ----


def test_reading_back_agrees_with_the_tensor_level(llama: Nugget2D) -> None:
    chosen = windows(3, 32)
    memories = llama.compress([window.text for window in chosen], ratio=4)
    read = read_back(llama, memories, [window.text for window in chosen])
    hits, distance = reconstruction_hits(llama, torch.tensor([window.ids for window in chosen]), 4)
    assert torch.stack([one.hits for one in read]).equal(hits)
    assert torch.stack([one.distance for one in read]).equal(distance)


def test_segments_are_read_each_from_its_own_nuggets(llama: Nugget2D) -> None:
    """A text of three segments reads back as its parts do alone."""
    text = tiny.TEXT[:250]
    memory = llama.compress(text, ratio=4)
    assert len(memory.segments) > 2
    whole = read_back(llama, [memory], [text])[0]
    assert len(whole.hits) == memory.num_tokens
    parts = [text[segment.start : segment.end] for segment in memory.segments]
    first = read_back(llama, [llama.compress(parts[0], ratio=4)], parts[:1])[0]
    torch.testing.assert_close(whole.losses[: len(first.losses)], first.losses, atol=1e-4, rtol=1e-4)
    assert whole.distance[: len(first.distance)].equal(first.distance)


def test_losses_after_contexts_are_those_of_score(llama: Nugget2D) -> None:
    window = next(w for w in windows(4) if tokenize(tiny.tokenizer(), llama.text(w.target))[0] == w.target)
    targets = torch.tensor([window.target])
    after = llama.text(window.target)
    memory = llama.compress(window.text, ratio=4)
    assert float(lm_losses(llama, [[]], targets).mean()) == pytest.approx(llama.score(after), abs=1e-4)
    assert float(memory_losses(llama, [memory], targets).mean()) == pytest.approx(
        llama.score(after, memory=memory), abs=1e-4
    )
    unequal = lm_losses(llama, [window.ids, window.ids[-3:]], targets.repeat(2, 1))
    torch.testing.assert_close(unequal[1:], lm_losses(llama, [window.ids[-3:]], targets), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(unequal[0], unequal[1], atol=1e-2)


def test_without_a_start_token_the_first_target_does_not_count(
    monkeypatch: pytest.MonkeyPatch, llama: Nugget2D
) -> None:
    window = windows(1)[0]
    targets = torch.tensor([window.target])
    monkeypatch.setattr(Nugget2D, "start_token", None)
    for losses in (
        lm_losses(llama, [[]], targets),
        lm_losses(llama, [window.ids], targets),
        no_memory_losses(llama, 16, targets),
    ):
        assert losses.shape == (1, 7)


def test_a_cell(llama: Nugget2D) -> None:
    chosen = windows(3)
    reference = measure_reference(llama, chosen)
    cell = measure_cell(llama, chosen, 4, reference, selection="even")
    assert cell["achieved_ratio"] == 4 and cell["windows"] == cell["segments"] == 3
    characters = sum(len(window.text) for window in chosen)
    assert cell["chars_per_nugget"] == pytest.approx(characters / 12, abs=0.01)
    assert 0 <= cell["token_accuracy"]["low"] <= cell["token_accuracy"]["value"] <= cell["token_accuracy"]["high"]
    assert len(cell["copy_span_profile"]) == 4
    # an untrained model misses nearly all, so the patch is long, and the file holds it, the nuggets and more
    assert 0 < cell["patch_bits_per_char"] < cell["exact_file_bits_per_char"] - cell["int8_nugget_bits_per_char"]
    memory = llama.compress(chosen[0].text, ratio=4, dtype="int8")  # its size is that of every other
    assert cell["int8_nugget_bits_per_char"] == pytest.approx(3 * 8 * memory.nbytes / characters, rel=1e-3)
    # at 1x the last k tokens are all tokens
    everything = measure_cell(llama, chosen, 1, reference)
    assert everything["nll_truncation"]["value"] == describe_reference(chosen, reference)["nll_full"]["value"]


# ---- runs ----


def settings(model: Nugget2D, **changes: Any) -> Settings:
    fields: dict[str, Any] = {
        "config": model.config,
        "weights": model.legacy_fingerprint.model,
        "tokenizer": model.legacy_fingerprint.tokenizer,
        "data": "a text",
        "data_sha256": "0",
        "windows": 2,
        "target": 8,
        "selection": "even",
    }
    return Settings(**(fields | changes))


def test_a_run_goes_on_where_it_stopped(llama: Nugget2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, float]] = []
    interrupt_at = 3

    def count(model: Nugget2D, chosen: list[Window], ratio: float, *rest: Any, **options: Any) -> dict[str, Any]:
        if len(measured) + 1 == interrupt_at:
            raise KeyboardInterrupt
        measured.append((len(chosen[0].ids), ratio))
        return measure_cell(model, chosen, ratio, *rest, **options)

    monkeypatch.setattr(distortion_run, "measure_cell", count)
    arguments = (llama, [tiny.TEXT], settings(llama))
    with pytest.raises(KeyboardInterrupt):
        run_distortion(*arguments, [8, 4], [16, 12], tmp_path)
    assert measured == [(16, 8), (16, 4)]
    interrupt_at = 0
    steps: list[tuple[int, int]] = []
    report = run_distortion(
        *arguments, [4, 8], [12, 16], tmp_path, on_progress=lambda done, total: steps.append((done, total))
    )
    assert measured[2:] == [(12, 4), (12, 8)]
    assert steps == [(12, 24), (24, 24)]
    assert [(cell["length"], cell["ratio"]) for cell in report["cells"]] == [(12, 4), (12, 8), (16, 4), (16, 8)]
    assert [entry["length"] for entry in report["lengths"]] == [12, 16]
    saved = json.loads((tmp_path / "distortion.json").read_text())
    assert saved["cells"] == report["cells"] and saved["environment"]["versions"]["torch"]
    assert run_distortion(*arguments, [4, 8], [12, 16], tmp_path)["cells"] == report["cells"]
    assert len(measured) == 4
    assert markdown(report).count("\n| 16 | 8x |") == 3


def test_other_settings_are_refused(llama: Nugget2D, tmp_path: Path) -> None:
    run_distortion(llama, [tiny.TEXT], settings(llama), [4], [12], tmp_path)
    other = settings(llama, selection="random", weights="1234")
    with pytest.raises(InputError, match=r"other settings \(weights, selection\)"):
        run_distortion(llama, [tiny.TEXT], other, [4], [12], tmp_path)
    report = run_distortion(llama, [tiny.TEXT], other, [8], [12], tmp_path, force=True)
    assert [cell["ratio"] for cell in report["cells"]] == [8]
    (tmp_path / "distortion.json").write_text('{"settings": 3')
    with pytest.raises(InputError, match="cannot be read as a report"):
        run_distortion(llama, [tiny.TEXT], other, [8], [12], tmp_path)


# ---- command line ----


def bench(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "distortion", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stderr


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in (tiny.TEXT, "too short", tiny.TEXT)))
    out = tmp_path / "new" / "metrics"
    arguments = ["--model", model, "--data", data, "--windows", 2, "--ratios", "4,8", "-o", out]
    bench(*arguments, "--lengths", "12,40")
    report = json.loads((out / "distortion.json").read_text())
    assert report["settings"]["data"] == "texts.jsonl" and len(report["cells"]) == 4
    assert report["chars_per_token"] == pytest.approx(len(tiny.TEXT) / len(IDS), rel=0.02)
    # a window of 40 tokens is cut by a model of 32
    assert [cell["segments"] for cell in report["cells"]] == [2, 2, 4, 4]
    assert "| 40 | 8x |" in (out / "distortion.md").read_text()
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == [f"distortion-{name}.png" for name in ("bits", "fidelity", "profile", "retained")]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)

    for wrong, saying in (
        (["--lengths", "12", "--selection", "random"], "other settings (selection)"),
        (["--lengths", "400"], "only 0 separate windows"),
        (["--lengths", "a few"], "--lengths takes numbers"),
        (["--ratios", "0.5"], "at least 1"),
        (["--data", tmp_path / "missing.txt"], "matches no file"),
    ):
        error = bench(*arguments, *wrong, code=1)
        assert error.startswith("error: ") and saying in error and error.count("\n") == 1


@pytest.mark.slow
def test_without_data_the_bundled_article_is_taken(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    bench("--model", model, "--ratios", "20", "--lengths", "600", "-o", tmp_path)
    report = json.loads((tmp_path / "distortion.json").read_text())
    assert report["lengths"][0]["windows"] >= 2
    assert len(report["settings"]["data_sha256"]) == 64
