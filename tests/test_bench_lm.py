"""Language modelling with bounded states: every way of reading against a slow one, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from typer.testing import CliRunner

import tiny
from cli_fixtures import save_tiny_model
from nugget2d import Nugget2D
from nugget2d.cli.app import app
from nugget2d.errors import InputError
from nugget2d.evaluation.streaming.full import Full, equal_text
from nugget2d.evaluation.streaming.nuggets import Compressed
from nugget2d.evaluation.streaming.reader import Budget
from nugget2d.evaluation.streaming.run import LmSettings, run_lm
from nugget2d.evaluation.streaming.sinks import SINKS, Sinks
from nugget2d.evaluation.streaming.tables import markdown
from nugget2d.evaluation.streaming.text import articles, cut
from nugget2d.modeling.cache import Nuggets, cached_states
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.losses import token_losses
from nugget2d.pooled import PooledMemory

pytestmark = pytest.mark.slow

BUDGET = Budget(states=24, chunk=8, ratio=4, share=0.5)
FIRST = BUDGET.text
LENGTH = 130


def pooled_memory() -> PooledMemory:
    """A model of pooled memories, trained as little as the others."""
    plain = tiny.trained("llama", "copies")
    model = PooledMemory(tiny.lm(), tiny.tokenizer(), plain.config.model_copy(update={"name": "pooled"}))
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("kind", ["even", "random", "learned", "pooled"])
def test_nuggets_are_those_of_a_stream(kind: Any) -> None:
    """Read token by token: the oldest nuggets are given up by whole segments, no query sees more than the budget."""
    model = pooled_memory() if kind == "pooled" else tiny.trained("llama", "copies", selection=kind)
    ids = tiny.random_ids(1, LENGTH)[0]
    stream = model.stream(BUDGET.recent_window, BUDGET.ratio, BUDGET.nuggets, chunk=BUDGET.chunk)
    losses, states = [], []
    for token in ids:
        losses.append(stream.append_scored([int(token)]))
        states.append(stream.cache_size)
    assert torch.allclose(Compressed(model, BUDGET)(ids, FIRST), torch.cat(losses)[FIRST:], atol=1e-4)
    assert max(states) == BUDGET.states
    assert min(states[FIRST:]) == BUDGET.states - BUDGET.chunk + 1


@torch.no_grad()
@pytest.mark.parametrize("stride", [5, 8])
def test_the_full_window_is_a_forward_pass_for_each_stride(llama: Nugget2D, stride: int) -> None:
    ids = tiny.random_ids(1, LENGTH)[0]
    expected = []
    for start in range(FIRST, LENGTH, stride):
        end = min(start + stride, LENGTH)
        seen = llama.after_start(ids[None, start + stride - 24 : end - 1])
        expected.append(token_losses(llama.decode(None, seen, prompt=None)[:, start - end :], ids[None, start:end])[0])
    assert torch.allclose(Full(llama, 24, stride)(ids, FIRST), torch.cat(expected), atol=1e-4)


def test_equal_text_is_no_less(llama: Nugget2D) -> None:
    full = equal_text(llama, FIRST, BUDGET.chunk)
    # of the first query of a stride, of a chunk; and the start token
    assert full.window - full.stride == BUDGET.text - BUDGET.chunk + 1
    assert full.stride == BUDGET.chunk < equal_text(llama, 10 * FIRST, BUDGET.chunk).stride


@torch.no_grad()
def naive_sinks(model: Nugget2D, ids: Tensor, states: int, chunk: int) -> Tensor:
    """One forward pass for each chunk over a cache that is moved to positions 0, 1, ... before it."""
    window = states - SINKS - chunk
    kept, losses = None, []
    starts = [0, *range(window + chunk, len(ids), chunk)]
    with model.parameters_by_role.role("base") as lm:
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            cache = DynamicCache(config=lm.config) if kept is None else kept.to_cache(lm.config)
            length = cache.get_seq_length()
            positions = torch.arange(length, length + end - start)[None]
            logits = lm(input_ids=ids[None, start:end], position_ids=positions, **as_cache(lm, cache)).logits
            targets = ids[None, start + 1 : end + 1]
            losses.append(token_losses(logits[:, : targets.shape[1]], targets)[0])
            keys, values = cached_states(cache)
            sinks, last = slice(0, SINKS), slice(keys[0].shape[2] - window, None)
            shift = torch.full((1, window), SINKS + window - keys[0].shape[2])
            moved = model.rotation([key[:, :, last] for key in keys], shift)
            kept = Nuggets(
                [torch.cat([key[:, :, sinks], own], dim=2) for key, own in zip(keys, moved, strict=True)],
                [torch.cat([value[:, :, sinks], value[:, :, last]], dim=2) for value in values],
            )
    return torch.cat(losses)


def test_sinks_are_a_cache_whose_positions_are_its_own(llama: Nugget2D) -> None:
    ids = tiny.random_ids(1, LENGTH)[0]
    found = Sinks(llama, 24, 8)(ids, FIRST)
    assert torch.allclose(found, naive_sinks(llama, llama.after_start(ids[None])[0], 24, 8)[FIRST:], atol=1e-4)
    other = torch.cat([ids[:SINKS].flip(0), ids[SINKS:]])
    assert not torch.allclose(Sinks(llama, 24, 8)(other, FIRST), found, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 10}, "multiple of 4 tokens"),
        ({"states": 20, "chunk": 16}, "multiple of a chunk's"),
        ({"states": 16}, "no room"),
        ({"share": 0.01}, "24 states, 0 of them nuggets"),
        ({"states": 100, "chunk": 40}, "longer than the model's window of 32"),
        ({"states": 240}, "contexts of 500"),
    ],
)
def test_what_cannot_be_read(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BUDGET.model_copy(update=changes).check(window=32, context=500)


# ---- text ----


def test_articles_begin_with_their_titles() -> None:
    text = "\n = One = \n \n Text = x . \n = 1 / s = \n 2 . \n \n = = Part = = \n \n More . \n = Two = \n \n End \n"
    one, two = articles(text)
    assert "\n" + one + two == text
    assert one.split()[:3] == ["=", "One", "="] and two.split()[:3] == ["=", "Two", "="]
    assert articles("no titles\n") == ["no titles\n"]


def test_blocks_tile_each_document_and_count_each_word_once() -> None:
    ids = tiny.tokenizer()(tiny.TEXT)["input_ids"]
    blocks = cut(tiny.tokenizer(), [tiny.TEXT, "short"], 30, 40, 10**6)
    assert len(blocks) == (len(ids) - 30) // 40
    assert torch.cat([block.ids[30:] for block in blocks]).tolist() == ids[30 : 30 + 40 * len(blocks)]
    assert all(block.ids[:30].tolist() == ids[40 * number : 40 * number + 30] for number, block in enumerate(blocks))
    before, after = (tiny.tokenizer().decode(part) for part in (ids[:30], ids[30 + 40 * len(blocks) :]))
    begun = len(tiny.TEXT.removesuffix(after).split()) - len(before.split())
    assert sum(block.words for block in blocks) == begun
    assert len(cut(tiny.tokenizer(), [tiny.TEXT], 30, 40, 100)) == 3
    with pytest.raises(InputError, match="no document has 70 tokens"):
        cut(tiny.tokenizer(), ["short"], 30, 40, 100)


# ---- runs ----


def test_a_run_measures_only_what_is_missing(llama: Nugget2D, tmp_path: Path) -> None:
    settings = LmSettings(
        config=llama.config,
        weights=llama.legacy_fingerprint.model,
        tokenizer=llama.legacy_fingerprint.tokenizer,
        data_sha256={"text": "0"},
        states=(24, 32),
        chunk=8,
        ratio=4,
        share=0.5,
        tokens=100,
        block=40,
    )
    arguments = {"text": [tiny.TEXT]}, settings, tmp_path
    report = run_lm(llama, None, *arguments)
    assert [cell["states"] for cell in report["cells"]] == [24] * 6 + [32] * 6
    assert report["corpora"][0]["tokens"] == 120 and report["corpora"][0]["warm_up"] == 3 * settings.warm_up
    report["cells"][0]["nats"][0] += 100  # would not survive being measured again
    (tmp_path / "lm.json").write_text(json.dumps(report))
    steps: list[tuple[int, int]] = []
    again = run_lm(llama, pooled_memory(), *arguments, on_progress=lambda done, total: steps.append((done, total)))
    assert [cell for cell in again["cells"] if cell["method"] != "compressive"] == report["cells"]
    assert steps == [(done, 240) for done in range(40, 241, 40)]
    assert "| compressive |" in markdown(again)
    with pytest.raises(InputError, match=r"other settings \(tokens\)"):
        run_lm(llama, None, arguments[0], settings.model_copy(update={"tokens": 50}), tmp_path)


# ---- command line ----


def bench(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "lm", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stderr


def test_the_command(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    records = [{"text": tiny.TEXT * 16, "split": "val"}, {"text": "not read " * 9000, "split": "train"}]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = f"{tmp_path / 'books.jsonl'}:split=val"
    out = tmp_path / "metrics"
    arguments = ["--model", model, "--data", data, "--states", "64", "--tokens", "2049", "-o", out]
    bench(*arguments)
    report = json.loads((out / "lm.json").read_text())
    assert [corpus["name"] for corpus in report["corpora"]] == ["books.jsonl:split=val"]
    assert report["corpora"][0]["tokens"] == 2 * 2048 and report["environment"]["versions"]["torch"]
    methods = [row["method"] for row in report["rows"]]
    assert len(set(methods)) == len(methods) == 6 and "compressive" not in methods
    ours, other = report["rows"][0], report["rows"][3]
    ratio = other["perplexity_per_token"]["value"] / ours["perplexity_per_token"]["value"]
    assert other["more"]["value"] == pytest.approx(100 * (ratio - 1), abs=0.01)
    assert other["more"]["low"] <= other["more"]["value"] <= other["more"]["high"]
    words = sum(report["corpora"][0]["words"])
    assert ours["perplexity_per_word"]["value"] == pytest.approx(
        torch.tensor(sum(report["cells"][0]["nats"]) / words).exp().item(), rel=1e-3
    )
    assert (out / "lm.md").read_text().count("\n| ") == 7

    for wrong, saying in (
        (["--chunk", "10"], "other settings (chunk)"),
        (["--share", "0.25"], "other settings (share)"),
        (["--share", "0.02"], "another --share"),
        (["--states", "8000"], "contexts of"),
        (["--states", "few"], "--states takes numbers"),
        (["--compressive", tmp_path / "none"], "none"),
        (["--data", tmp_path / "missing.txt"], "matches no file"),
        (["--data", f"{tmp_path / 'books.jsonl'}:split=none"], "no document has"),
    ):
        error = bench(*arguments, *wrong, "-o", tmp_path / "other" if "split" in str(wrong) else out, code=1)
        assert error.startswith("error: ") and saying in error and error.count("\n") == 1
