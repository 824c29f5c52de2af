"""Recipes, data packs, schedules, and the loop: a real (tiny) run, interrupted and resumed."""

import json
import lzma
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import RecipeError
from nugget2d.streaming.layout import Layout
from nugget2d.training import tasks
from nugget2d.training.corpus import Pack, documents, make_pack
from nugget2d.training.recipe import CompressStage, OptimConfig, RatioConfig, Source, StreamConfig, load_recipe
from nugget2d.training.run import fit_recipe, train
from nugget2d.training.schedule import choose, learning_rate_factor, sample_ratio
from nugget2d.training.tasks import CompressTask

HOME = Path(__file__).parent.parent / "recipes"
RECIPES = sorted([*HOME.glob("*.yaml"), *HOME.glob("stories/*.yaml")])
LINE = "the keeper of the light wrote in his book that the sea was calm and the lamp had burned all night ."
WORDS = LINE.split()
MIX = {"reconstruct": 6, "uniform": 1, "continue": 2, "lm": 1}
PHASE = {"objectives": MIX, "windows": {32: 1}, "segments": 2}
COMPRESS = {"tokens": 1, "batch_tokens": 1, "optim": {"lr": 1}, "phases": [PHASE]}


def small_recipe(folder: Path, **changes: object) -> Path:
    """A recipe that trains in seconds, its text beside it."""
    generator = torch.Generator().manual_seed(1)
    text = " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (6000,), generator=generator))
    (folder / "text.txt").write_text(text)
    content: dict[str, object] = {
        "name": "tiny",
        "out": "run",
        "data": {"train": [{"path": "text.txt"}], "held_out": [{"path": "text.txt", "max_chars": 4000}]},
        "tokenizer": {"vocab_size": 300},
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 3, "num_heads": 2},
        "pretrain": {
            "tokens": 5120, "window": 32, "batch_tokens": 256, "evaluate_every": 10, "evaluate_windows": 4,
            "optim": {"lr": 4e-3, "warmup_steps": 5},
        },
        "compress": {
            "tokens": 10240, "batch_tokens": 256, "target": 16,
            "phases": [PHASE | {"selections": {"even": 1, "window": 1}}],
            "ratios": {"start": [2, 4], "end": [1, 4]}, "evaluate_every": 10, "evaluate_windows": 4,
            "optim": {"lr": 4e-3, "warmup_steps": 5},
        },
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.compress is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, "unknown key `sed`"),
        ({"name": None}, "`name`"),
        ({"compress": None, "pretrain": None}, "nothing to do"),
        ({"model": None}, "give `tokenizer` and `model`"),
        ({"pretrain": {"batch_tokens": 64, "optim": {"lr": 1e-3}}}, "exactly one budget"),
        ({"pretrain": {"tokens": 1, "batch_tokens": 64, "optim": {}}}, "missing key `pretrain.optim.lr`"),
        ({"data": {"train": [{"path": "none.txt"}], "held_out": [{"path": "text.txt"}]}}, "none.txt"),
        ({"compress": COMPRESS | {"ratios": {"start": [9, 2]}}}, "[9, 2]"),
        ({"compress": COMPRESS | {"adapters": "lora"}}, "leave `lm` out"),
        ({"compress": COMPRESS | {"phases": [PHASE | {"from": 0.5}]}}, "`from: 0`"),
        (
            {"compress": COMPRESS | {"mixed_ratios": True, "phases": [PHASE | {"objectives": {"stream": 1}}]}},
            "`stream` reads rows of one ratio",
        ),
        ({"compress": COMPRESS | {"init": "nano", "adapters": "copies"}}, "brings its own adapters: remove it"),
        ({"compress": COMPRESS | {"init": "nano"}}, "'nano' brings its own LM"),
        ({"compress": COMPRESS | {"phases": [PHASE | {"objectives": {"guess": 1}}]}}, "guess"),
        ({"model": {"hidden_size": 30, "intermediate_size": 8, "num_layers": 1, "num_heads": 4}}, "hidden_size"),
    ],
)
def test_recipe_errors_name_the_key(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        train(small_recipe(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_recipe_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)


def test_former_names_of_stream_settings_are_read() -> None:
    now = StreamConfig.model_validate({"recent_window": {16: 1}, "visible_segments": {2: 1}})
    assert StreamConfig.model_validate({"tau": {16: 1}, "reach": {2: 1}}) == now


def test_documents_reads_every_format_alike(tmp_path: Path) -> None:
    records = [{"text": "one\r\ntwo", "split": "train"}, {"text": "three", "split": "val"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write(lines)
    (tmp_path / "c.txt").write_bytes(b"one\r\ntwo")
    for name in ("a.jsonl", "b.jsonl.xz"):
        assert list(documents(Source(path=name), tmp_path)) == ["one\r\ntwo", "three"]
        assert list(documents(Source(path=name, where={"split": "val"}), tmp_path)) == ["three"]
        assert list(documents(Source(path=name, max_chars=5), tmp_path)) == ["one\r\n"]
    assert list(documents(Source(path="c.txt"), tmp_path)) == ["one\r\ntwo"]
    (tmp_path / "d.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(RecipeError, match="line 1"):
        list(documents(Source(path="d.jsonl"), tmp_path))


def test_pack_holds_the_text_and_is_reused(tmp_path: Path) -> None:
    recipe = load_recipe(small_recipe(tmp_path))
    tokenizer = make_pack(tmp_path / "pack", recipe.data, tmp_path, recipe.tokenizer, None)
    pack = Pack(tmp_path / "pack" / "train.bin")
    assert tokenizer.decode(pack.ids[:-1].tolist()) == (tmp_path / "text.txt").read_text()
    assert pack.ids[-1] == tokenizer.eos_token_id
    (tmp_path / "text.txt").unlink()  # made once, a pack is all that training reads
    make_pack(tmp_path / "pack", recipe.data, tmp_path, recipe.tokenizer, None)
    with pytest.raises(RecipeError, match="give more text"):
        pack.windows(1, 10**7, torch.Generator())


def test_schedules() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10, decay=0.5)
    assert learning_rate_factor(0, 0.0, optim) == pytest.approx(0.1)
    assert learning_rate_factor(100, 0.5, optim) == 1.0
    assert learning_rate_factor(100, 0.75, optim) == pytest.approx(0.5)
    assert learning_rate_factor(100, 1.0, optim) == 0.0
    generator = torch.Generator().manual_seed(0)
    ratios = RatioConfig(start=(8, 16), end=(2, 50), moves=(0.2, 0.5))
    early = [sample_ratio(0.1, ratios, generator) for _ in range(200)]
    late = [sample_ratio(0.9, ratios, generator) for _ in range(200)]
    assert min(early) >= 8 and max(early) <= 16
    assert 2 <= min(late) < 3 and 40 < max(late) <= 50
    draws = [choose({"a": 3.0, "b": 1.0, "c": 0.0}, generator) for _ in range(400)]
    assert 240 < draws.count("a") < 360 and draws.count("c") == 0


@pytest.mark.slow
def test_training_resumes_to_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(small_recipe(tmp_path), out=tmp_path / "whole")

    class Interrupted(Exception):
        pass

    from nugget2d.training import loop

    steps = loop._Run._step
    calls = {"left": 33}  # 20 steps of pre-training, then into the compressor stage

    def stop_early(run: object) -> object:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise Interrupted
        return steps(run)  # type: ignore[arg-type]

    monkeypatch.setattr(loop._Run, "_step", stop_early)
    recipe = small_recipe(tmp_path, save_minutes=1e-9)  # a checkpoint after every step
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "parts")
    monkeypatch.setattr(loop._Run, "_step", steps)
    parts = train(recipe, out=tmp_path / "parts")
    for stage, count in (("pretrain", 20), ("compress", 40)):
        first, second = losses(whole / stage / "log.jsonl"), losses(parts / stage / "log.jsonl")
        assert len(first) == count
        assert second == pytest.approx(first, abs=1e-4)
        assert first[-1] < first[0]
    assert (whole / "compress" / "loss.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(whole / "model" / "base" / "model.safetensors", "pt") as weights:
        assert not any("lm_head" in name for name in weights.keys())  # noqa: SIM118  tied: written once
    model = Nugget2D.from_pretrained(whole / "model")
    text = "the keeper of the light wrote in his book"
    memory = model.compress(text, ratio=1, exact=True)
    assert model.reconstruct(memory) == text


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "frozen"), [(0, True), (3e-3, False)])
def test_a_rate_of_zero_freezes_the_scorer(tmp_path: Path, rate: float, frozen: bool) -> None:
    content = yaml.safe_load(small_recipe(tmp_path, pretrain=None).read_text())
    phases = [{"objectives": {"reconstruct": 1}, "windows": {32: 1}}]
    scorers = []
    for steps in (1, 4):
        content["compress"] |= {"tokens": 256 * steps, "selection": "learned", "phases": phases}
        content["compress"]["optim"] = {"lr": 4e-3, "scorer_lr": rate, "warmup_steps": 0}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
        recipe = load_recipe(tmp_path / "tiny.yaml")
        model = fit_recipe(recipe, tmp_path, tmp_path / f"{steps}", pack=tmp_path / "pack")
        assert model is not None
        scorers.append(model.scorer.output.weight)
    assert torch.equal(*scorers) == frozen


@pytest.mark.slow
def test_a_compressor_on_a_base_of_ones_own(tmp_path: Path) -> None:
    base = train(small_recipe(tmp_path, compress=None), out=tmp_path / "lm") / "base"
    before = load_file(base / "model.safetensors")
    content = yaml.safe_load(small_recipe(tmp_path).read_text())
    for key in ("tokenizer", "model", "pretrain"):
        del content[key]
    content["compress"] |= {"base": "lm/base", "adapters": "lora", "lora_rank": 4}
    content["compress"]["phases"] = [{"objectives": {"reconstruct": 7, "continue": 3}, "windows": {32: 1}}]
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(content))
    folder = train(tmp_path / "lora.yaml")
    assert folder == tmp_path / "run"
    log = [json.loads(line) for line in (folder / "compress" / "log.jsonl").read_text().splitlines()]
    losses = [record["held_out"]["continue_none"] for record in log if "held_out" in record]
    assert losses[-1] < losses[0]
    after = load_file(folder / "model" / "base" / "model.safetensors")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert Nugget2D.from_pretrained(folder / "model").config.adapters == "lora"


@pytest.mark.slow
def test_streams_are_trained(tmp_path: Path) -> None:
    content = yaml.safe_load(small_recipe(tmp_path, pretrain=None).read_text())
    phase = {"objectives": {"stream": 3, "reconstruct": 1}, "windows": {32: 1}, "segments": 2}
    streams = {"recent_window": {16: 1, 8: 1}, "chunk": {32: 1, 8: 1}, "context": 64}
    content["compress"] |= {"streams": streams, "phases": [phase], "selection": "learned"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    folder = train(tmp_path / "tiny.yaml")
    log = [json.loads(line) for line in (folder / "compress" / "log.jsonl").read_text().splitlines()]
    streamed = [record["loss_stream"] for record in log if "loss_stream" in record]
    assert len(streamed) > 10 and streamed[-1] < streamed[0]
    model = Nugget2D.from_pretrained(folder / "model")
    assert model.config.context == 2 * 32 + 16 + 32 + 1  # every position that was read, and no other
    stream = model.stream(16, 4)
    stream.append(LINE * 8)
    assert stream.num_nuggets > 0


def test_streams_are_as_they_will_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step draws one of the values of `recent_window`, `chunk`, `ratio` and `visible_segments`."""
    drawn: set[tuple[int, int, int | None, int]] = set()

    def watched(model: Nugget2D, ids: Tensor, layout: Layout, count: int, *others: object) -> tuple[Tensor, None]:
        drawn.add((layout.recent_window, layout.chunk, layout.visible_segments, count))
        return ids.float().sum(), None

    monkeypatch.setattr(tasks, "stream_loss", watched)
    phase = {"objectives": {"stream": 1}, "windows": {32: 1}}
    streams = {
        "recent_window": {8: 1},
        "chunk": {8: 1, 16: 1},
        "ratio": {4: 1, 8: 1},
        "visible_segments": {1: 1, 3: 1},
        "context": 32,
    }
    stage = CompressStage(tokens=64, batch_tokens=64, optim={"lr": 1e-3}, phases=[phase], streams=streams)
    (tmp_path / "done").write_text("uint16")
    (tmp_path / "text.bin").write_bytes(bytes(1000))
    pack = Pack(tmp_path / "text.bin")
    task = CompressTask(tiny.make("llama", "copies"), stage, pack, pack)
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        task.loss(0.0, generator, generator)
    counts = {(8, 4): 2, (8, 8): 1, (16, 4): 4, (16, 8): 2}
    assert drawn == {(8, chunk, visible, count) for (chunk, _), count in counts.items() for visible in (1, 3)}


@pytest.mark.slow
def test_smoke_recipe_learns_to_copy(tmp_path: Path) -> None:
    folder = train(HOME / "smoke.yaml", out=tmp_path / "smoke")
    records = [json.loads(line) for line in (folder / "compress" / "log.jsonl").read_text().splitlines()]
    curve = [record["loss_reconstruct"] for record in records if "loss_reconstruct" in record]
    assert sum(curve[-10:]) < 0.5 * sum(curve[:10])
    last = records[-1]["held_out"]
    assert last["accuracy_4x"] > 0.9 and last["continue_10x"] < 0.7 * last["continue_none"]
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"one nugget in 4, teacher-forced | {last['accuracy_4x']:.3f} |" in card
    assert Nugget2D.from_pretrained(folder / "model").config.name == "smoke"


def test_going_on_from_a_trained_compressor(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    old = tiny.trained(adapters="copies", window=16, context=64)
    old.save_pretrained(folder)
    alone = {"pretrain": None, "model": None, "tokenizer": None}
    stage = {"init": "old", "tokens": 512, "batch_tokens": 256, "target": 16, "optim": {"lr": 1e-3, "warmup_steps": 0}}
    path = small_recipe(tmp_path, **alone, compress=stage | {"phases": [PHASE | {"segments": 1}]})
    out = train(path)
    new = Nugget2D.from_pretrained(out / "model")
    assert new.config.name == "tiny" and new.config.flag == old.config.flag
    # the longest that either has seen
    assert (new.config.window, new.config.context) == (32, 64)
    assert new.ids(LINE).tolist() == old.ids(LINE).tolist()
    first = json.loads((out / "compress" / "log.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    # two steps of 1e-3: near where it came from, but not there
    name = "parameters_by_role.encoder.layers.0.self_attn.q_proj.weight"
    moved = (new.state_dict()[name] - old.state_dict()[name]).abs().max()
    assert 1e-4 < moved < 1e-2


def test_adapters_cannot_go_on_with_plain_lm(tmp_path: Path) -> None:
    tiny.trained(adapters="lora").save_pretrained(tmp_path / "old")
    alone = {"pretrain": None, "model": None, "tokenizer": None}
    with pytest.raises(RecipeError, match="leave `lm` out"):
        train(small_recipe(tmp_path, **alone, compress=COMPRESS | {"init": "old"}))
