"""Plug-ins of training: a recipe names them by import path; they change the model and add losses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from torch import Tensor

from nugget2d import Nugget2D
from nugget2d.errors import RecipeError
from nugget2d.training.corpus import Pack
from nugget2d.training.plugins import AuxiliaryLoss, MicroBatch, Plugin
from nugget2d.training.recipe import CompressStage, Objective, load_recipe
from nugget2d.training.run import fit_recipe, train
from test_training import PHASE, small_recipe

ROOT = Path(__file__).parent.parent
OBJECTIVES = {"reconstruct": 1, "continue": 1, "stream": 1, "lm": 1}
STREAMS = {"recent_window": {8: 1}, "chunk": {8: 1}, "context": 16}


class Renamed(Plugin):
    """Changes the model's configuration; refuses adapters."""

    to: str

    def check(self, stage: CompressStage) -> None:
        if stage.adapters == "lora":
            raise RecipeError("not with `adapters: lora`")

    def prepare(self, model: Nugget2D, text: Pack) -> Nugget2D:
        model.config = model.config.model_copy(update={"name": self.to})
        return model


class Watched(AuxiliaryLoss):
    """Adds the mean square of the final norm's output to two objectives, and keeps what it was given."""

    objectives: ClassVar[tuple[Objective, ...]] = ("reconstruct", "stream")
    seen: ClassVar[list[MicroBatch]] = []

    def weight_at(self, progress: float) -> float:
        return self.weight * (1 + progress)

    @contextmanager
    def watch(self, model: Nugget2D) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []
        hook = model.lm.base_model.norm.register_forward_hook(lambda module, inputs, output: found.append(output))
        yield found
        hook.remove()

    def losses(self, batch: MicroBatch, watched: list[Tensor]) -> dict[str, Tensor]:
        self.seen.append(batch)
        return {"norm": watched[-1].square().mean()}


def recipe(folder: Path, *plugins: dict[str, Any], **changes: object) -> Path:
    """A recipe of a few steps with these plug-ins, its text beside it."""
    path = small_recipe(folder, pretrain=None)
    content = yaml.safe_load(path.read_text())
    content["compress"] |= {
        "plugins": list(plugins), "tokens": 5120, "streams": STREAMS, "phases": [PHASE | {"objectives": OBJECTIVES}],
    }  # fmt: skip
    content["compress"] |= changes
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_plugin_changes_the_model_and_adds_its_weighted_loss(tmp_path: Path) -> None:
    Watched.seen.clear()
    path = recipe(tmp_path, {"use": f"{__name__}:Renamed", "to": "other"}, {"use": f"{__name__}:Watched", "weight": 3})
    folder = train(path)
    assert Nugget2D.from_pretrained(folder / "model").config.name == "other"
    records = [json.loads(line) for line in (folder / "compress" / "log.jsonl").read_text().splitlines()]
    batches = iter(Watched.seen)
    for number, record in enumerate(records):
        (objective,) = (name for name in OBJECTIVES if f"loss_{name}" in record)
        added = 0.0
        if objective in Watched.objectives:
            batch = next(batches)
            assert batch.progress == number / len(records) and batch.encoded is not None
            rows = len(batch.ids) * (batch.layout.segments or 1)
            assert len(batch.encoded.index) == rows and batch.ids.shape[1] == batch.layout.length
            added = 3 * (1 + batch.progress) * record["loss_norm"]
        assert record["loss"] == pytest.approx(record[f"loss_{objective}"] + added, abs=1e-4)
        assert ("loss_norm" in record) == (objective in Watched.objectives)
    assert next(batches, None) is None and len(records) == 20
    assert {name for name in OBJECTIVES for record in records if f"loss_{name}" in record} == set(OBJECTIVES)


def test_draws_do_not_depend_on_plugins(tmp_path: Path) -> None:
    """The first step of the same recipe with a loss and without it: the same batch, the same loss of the objective."""
    found = []
    for name, plugins in (("with", [{"use": f"{__name__}:Watched", "weight": 1}]), ("without", [])):
        path = recipe(tmp_path, *plugins, tokens=256, phases=[PHASE | {"objectives": {"reconstruct": 1}}])
        fit_recipe(load_recipe(path), tmp_path, tmp_path / name, pack=tmp_path / "pack")
        found.append(json.loads((tmp_path / name / "compress" / "log.jsonl").read_text())["loss_reconstruct"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"use": "no.such.place:Thing"}, r"cannot import plugin 'no.such.place:Thing'.*run `python -m nugget2d train`"),
        ({"use": f"{__name__}:ROOT"}, "is no subclass of"),
        ({"use": f"{__name__}:Nothing"}, "is no subclass of"),
        ({"use": "Thing"}, r"`compress.plugins.0.use` is 'Thing': give the import path"),
        ({"use": f"{__name__}:Renamed"}, "missing key `to`"),
        ({"use": f"{__name__}:Renamed", "to": "x", "from": 1}, "unknown key `from`"),
        ({"use": f"{__name__}:Watched", "weight": 0}, "`weight` is 0"),
        ({"to": "x"}, "missing key `compress.plugins.0.use`"),
    ],
)
def test_errors_name_the_plugin_and_the_remedy(tmp_path: Path, plugin: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        train(recipe(tmp_path, plugin))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()  # nothing is made before that is known


def test_a_plugin_refuses_a_stage(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not with `adapters: lora`"):
        phases = [{"objectives": {"reconstruct": 1}, "windows": {32: 1}}]
        train(recipe(tmp_path, {"use": f"{__name__}:Renamed", "to": "x"}, adapters="lora", phases=phases))


@pytest.mark.e2e
def test_plugins_are_found_from_the_folder_that_holds_them(tmp_path: Path) -> None:
    """`python -m nugget2d` puts the current folder on the path; elsewhere the message says so."""
    path = recipe(tmp_path, {"use": "research.readout_loss:ReadoutLoss", "weight": 0})
    command = [sys.executable, "-m", "nugget2d", "train", str(path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}

    def message(folder: Path) -> str:
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        return " ".join(run.stderr.split())

    assert "run `python -m nugget2d train` from that folder" in message(tmp_path)
    assert "`weight` is 0" in message(ROOT)  # found, and its options looked at
