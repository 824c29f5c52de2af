"""Two processes train what one trains: the same curves from any checkpoint, by DDP and by FSDP2."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import RecipeError
from nugget2d.modeling import precision
from nugget2d.training.loop import fit
from nugget2d.training.processes import Processes
from nugget2d.training.recipe import CompressStage
from nugget2d.training.run import train
from nugget2d.training.spread import Replicas
from nugget2d.training.tasks import CompressTask
from test_training import PHASE, losses, small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

OFFSETS = {"use": "research.relative_offset:RelativeOffsets"}
READOUT = {"use": "research.readout_loss:ReadoutLoss", "weight": 0.5}
INSERT = {"use": "research.induction:InsertLayer"}
INDUCTION = {"use": "research.induction_loss:InductionLoss", "weight": 0.5}
OBJECTIVES = {"reconstruct": 2, "uniform": 1, "continue": 2, "distill": 1, "lm": 1}
STEPS, HALF = 20, 10


def recipes(folder: Path) -> Callable[..., Path]:
    """Writes recipes into `folder` whose steps do not depend on how many there are."""
    content = yaml.safe_load(small_recipe(folder).read_text())
    content["pretrain"] |= {"tokens": 1024, "accumulate": 2, "batch_tokens": 128}
    content["compress"] |= {
        "batch_tokens": 64, "accumulate": 4, "ratios": {"start": [2, 4], "end": [2, 4]}, "evaluate_every": HALF,
        "evaluate_windows": 2, "phases": [PHASE | {"objectives": OBJECTIVES, "selections": {"even": 1, "random": 1}}],
        "optim": {"lr": 1e-3, "warmup_steps": 5, "decay": 0}, "plugins": [OFFSETS, READOUT],
    }  # fmt: skip

    def write(name: str, parallel: str, steps: int, without: tuple[str, ...] = (), **compress: object) -> Path:
        changed = content | {"parallel": parallel}
        changed["compress"] = content["compress"] | {"tokens": 256 * steps} | compress
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in changed.items() if key not in without}))
        return path

    return write


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, by names that say where a run began and where it ended."""
    folder = tmp_path_factory.mktemp("parallel")
    write = recipes(folder)
    ddp, fsdp = write("ddp", "ddp", STEPS), write("fsdp", "fsdp", STEPS)
    short = write("short", "fsdp", HALF)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "has_fast_bfloat16", lambda device: False)
        train(ddp, out=folder / "one")
        train(short, out=folder / "half")
        scratch = ("pretrain", "model", "tokenizer")
        options = {
            "base": "one/base", "adapters": "lora", "lora_rank": 4, "plugins": [],
            "checkpoint_activations": True, "mixed_ratios": True,
            "phases": [PHASE | {"objectives": {"reconstruct": 1, "continue": 1}, "selections": {"learned": 1}}],
        }  # fmt: skip
        lora = write("lora", "fsdp", STEPS, scratch, **options)
        train(lora, out=folder / "lora-one")
        options = {
            "init": "one/model", "plugins": [INSERT, READOUT, INDUCTION],
            "phases": [PHASE | {"objectives": {"stream": 1, "lm": 1}}],
            "streams": {"recent_window": {8: 1}, "chunk": {8: 1}, "context": 16},
        }  # fmt: skip
        extended = write("extended", "fsdp", HALF, scratch, **options)
        train(extended, out=folder / "extended-one")
        for name in ("one-ddp", "one-fsdp"):
            shutil.copytree(folder / "half", folder / name)
        torchrun(
            f"{short}:{folder / 'fsdp-ddp'}", f"{ddp}:{folder / 'ddp'}", f"{fsdp}:{folder / 'fsdp'}",
            f"{ddp}:{folder / 'one-ddp'}", f"{fsdp}:{folder / 'one-fsdp'}", f"{short}:{folder / 'fsdp-one'}",
            f"{ddp}:{folder / 'fsdp-ddp'}", f"{lora}:{folder / 'lora-fsdp'}", f"{extended}:{folder / 'extended-fsdp'}",
        )  # fmt: skip
        train(ddp, out=folder / "fsdp-one")
    return folder


def torchrun(*pairs: str) -> None:
    worker = Path(__file__).parent / "parallel_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    path = os.pathsep.join(filter(None, sys.path))  # with what pytest put there
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(
        [*command, *pairs], env=environment, capture_output=True, text=True, check=False, timeout=400
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("2 x cpu") == len(pairs)  # one process prints, and knows of two


@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-ddp", "one-fsdp", "fsdp-ddp", "fsdp-one"])
def test_two_processes_follow_the_curve_of_one(runs: Path, name: str) -> None:
    stages = ("compress",) if name.startswith("one-") else ("pretrain", "compress")
    for stage in stages:
        one, two = (losses(runs / run / stage / "log.jsonl") for run in ("one", name))
        assert len(one) == len(two) and two == pytest.approx(one, abs=1e-4)
    logs = [(runs / run / "compress" / "log.jsonl").read_text().splitlines() for run in ("one", name)]
    one, two = (json.loads(log[-1]) for log in logs)
    assert two["held_out"]["lm_loss"] == pytest.approx(one["held_out"]["lm_loss"], abs=1e-3)
    trained = {key for line in logs[0] for key in json.loads(line) if key.startswith("loss_")}
    assert trained == {f"loss_{name}" for name in (*OBJECTIVES, "readout")}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_save_the_model_of_one(runs: Path, name: str) -> None:
    for file in ("nugget2d.safetensors", "base/model.safetensors"):
        one, two = (load_file(runs / run / "model" / file) for run in ("one", name))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[key].float(), two[key].float(), atol=1e-2) for key in one)
    text = "the keeper of the light"
    model = Nugget2D.from_pretrained(runs / name / "model")
    assert model.reconstruct(model.compress(text, ratio=2, exact=True)) == text


def test_adapters_of_a_frozen_base_are_sharded_and_recomputed(runs: Path) -> None:
    one, two = (losses(runs / run / "compress" / "log.jsonl") for run in ("lora-one", "lora-fsdp"))
    assert len(one) == STEPS and two == pytest.approx(one, abs=1e-4)
    base = load_file(runs / "one" / "base" / "model.safetensors")
    after = load_file(runs / "lora-fsdp" / "model" / "base" / "model.safetensors")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in base.items())


def test_an_inserted_layer_is_sharded(runs: Path) -> None:
    logs = [
        (runs / run / "compress" / "log.jsonl").read_text().splitlines() for run in ("extended-one", "extended-fsdp")
    ]
    for name, least in (("loss_induction", HALF), ("loss_value_matching", 1)):
        one, two = ([record[name] for record in map(json.loads, log) if name in record] for log in logs)
        assert len(one) >= least and two == pytest.approx(one, abs=1e-4)


def test_micro_batches_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    model = tiny.make("llama", "copies")
    phase = {"objectives": {"reconstruct": 1}, "windows": {16: 1}}
    stage = CompressStage(tokens=64, batch_tokens=32, accumulate=3, optim={"lr": 1e-3}, phases=[phase])
    task = CompressTask(model, stage, None, None)  # type: ignore[arg-type]  # refused before data is drawn
    spread = Replicas(model, Processes(torch.device("cpu"), rank=0, count=2))
    with pytest.raises(RecipeError, match=r"2 processes cannot share out `compress.accumulate: 3`"):
        fit(task, spread, tmp_path, seed=0, save_minutes=1, fresh=True)
