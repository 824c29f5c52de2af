"""Refinement: the nuggets of one text get better, the model stays as it is."""

import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.cli.app import app
from nugget2d.errors import AccuracyWarning, InputError
from nugget2d.inference.placement import segment_nuggets
from nugget2d.methods.nugget.encoding import pad
from nugget2d.modeling.losses import token_losses
from nugget2d.text.segmentation import split

pytestmark = pytest.mark.slow

TEXT = tiny.TEXT[:300]


@torch.no_grad()
def losses(model: Nugget2D, memory: Memory) -> torch.Tensor:
    """(segments,) mean reconstruction loss, in nats."""
    rows = []
    for number, segment in enumerate(split(model.tokenizer, TEXT, model.config.window)):
        ids = pad([segment.ids], model.device)
        logits = model.decode(segment_nuggets(model, [(memory, number)]), ids[:, :-1], prompt="reconstruct")
        rows.append(token_losses(logits, ids).mean())
    return torch.stack(rows)


def accuracies(memory: Memory) -> list[float]:
    return [segment.accuracy for segment in memory.segments]


@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_segment_reads_better(adapters: str, dtype: str) -> None:
    model = tiny.trained("llama", adapters)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = model.compress(TEXT, ratio=8, dtype=dtype, exact=True)
    after = model.compress(TEXT, ratio=8, dtype=dtype, optimize_steps=15)

    assert (losses(model, after) < losses(model, before) - 0.1).all()
    assert all(a >= b for a, b in zip(accuracies(after), accuracies(before), strict=True))
    assert after.dtype == dtype and after.num_nuggets == before.num_nuggets
    assert after.spans == before.spans

    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training and not any(states.data.requires_grad for states in after.keys)


def test_a_segment_is_refined_alike_in_any_batch(llama: Nugget2D) -> None:
    texts = [tiny.TEXT[:40], tiny.TEXT[40:70], tiny.TEXT[200:280]]
    together = llama.compress(texts, ratio=8, optimize_steps=5)
    for text, memory in zip(texts, together, strict=True):
        alone = llama.compress(text, ratio=8, optimize_steps=5)
        for a, b in zip((*alone.keys, *alone.values), (*memory.keys, *memory.values), strict=True):
            torch.testing.assert_close(a.data, b.data, atol=2e-3, rtol=1e-3)


def test_it_stops_at_quality_and_says_what_missed(llama: Nugget2D) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        enough = llama.compress("The keeper wrote.", ratio=1, target_accuracy=0.2, optimize_steps=200)
        whole = llama.compress("The keeper wrote.", ratio=1, optimize_steps=300)
    assert 0.2 <= enough.accuracy < 1
    assert whole.accuracy == 1
    assert llama.reconstruct(whole) == "The keeper wrote."
    with pytest.warns(AccuracyWarning, match="optimize longer"):
        llama.compress(TEXT, ratio=8, target_accuracy=0.99, optimize_steps=1)


@pytest.mark.filterwarnings("ignore::nugget2d.errors.AccuracyWarning")
def test_what_is_good_enough_is_left_alone(llama: Nugget2D) -> None:
    plain = llama.compress(tiny.TEXT, ratio=8, exact=True)
    target = max(accuracies(plain))
    assert min(accuracies(plain)) < target
    refined = llama.compress(tiny.TEXT, ratio=8, optimize_steps=5, target_accuracy=target)
    for part, accuracy in zip(plain.segment_slices, accuracies(plain), strict=True):
        same = torch.equal(plain.keys[0].data[:, part], refined.keys[0].data[:, part])
        assert same == (accuracy == target)


@torch.no_grad()
def test_going_on_comes_nearer_to_what_the_text_would_say(llama: Nugget2D, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, rest = split(llama.tokenizer, TEXT, 32)[0], llama.ids(tiny.TEXT[300:400])
    length = len(segment.ids)
    whole = torch.cat([torch.tensor([segment.ids]), rest], 1)
    expected = llama.decode(None, whole[:, :-1], prompt=None)[:, length - 1 :].log_softmax(-1)

    def divergence(steps: int) -> float:
        """From the LM that sees the text, on a continuation that was not imagined."""
        nuggets = segment_nuggets(llama, [(llama.compress(segment.text, ratio=8, optimize_steps=steps), 0)])
        predicted = llama.decode(nuggets, rest[:, :-1], prompt="continue", start=length).log_softmax(-1)
        return float((expected.exp() * (expected - predicted)).sum(-1).mean())

    before, after = divergence(0), divergence(30)
    assert after < before
    monkeypatch.setattr("nugget2d.methods.nugget.optimization.CONTINUATION", 0.0)
    assert after < divergence(30)


def test_exact_mode_fits_the_refined_states(llama: Nugget2D) -> None:
    plain = llama.compress(TEXT, ratio=8, exact=True, dtype="int8")
    refined = llama.compress(TEXT, ratio=8, exact=True, dtype="int8", optimize_steps=30)
    assert llama.reconstruct(refined) == TEXT
    assert sum(map(len, refined.exact.patches)) < sum(map(len, plain.exact.patches))


def test_progress_and_bad_steps(llama: Nugget2D) -> None:
    calls: list[tuple[int, int]] = []
    memory = llama.compress(TEXT, optimize_steps=1, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(memory.segments),) * 2
    with pytest.raises(InputError, match="optimize_steps"):
        llama.compress(TEXT, optimize_steps=-1)


def test_the_command_refines(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.trained("llama", "copies", name=str(folder)).save_pretrained(folder)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    out = tmp_path / "a.nugget"
    arguments = ["compress", str(tmp_path / "a.txt"), "-o", str(out), "--model", str(folder), "--ratio", "8"]
    result = CliRunner().invoke(app, [*arguments, "--refine", "20"])
    assert result.exit_code == 0, result.output
    plain = Nugget2D.from_pretrained(folder).compress(TEXT, ratio=8, exact=True)
    assert Memory.load(out).accuracy > plain.accuracy
