"""One arm of a study with one seed, in a process of its own: train, measure, write `result.json`.

python -m nugget2d.studies.arm STUDY.yaml OUT ARM SEED
"""

import json
import sys
from pathlib import Path
from typing import Any

from nugget2d.errors import NuggetError, RecipeError
from nugget2d.evaluation.held_out import held_out_figures
from nugget2d.files import atomic_write
from nugget2d.studies.study import Arm, load_study
from nugget2d.training.corpus import Pack
from nugget2d.training.run import fit_recipe

RATIOS = (4, 10, 20, 40)
STAGES = ("pretrain", "compress")


def run_arm(arm: Arm, home: Path, out: Path, windows: int) -> None:
    """Train from the arm's checkpoint, if there is one; measure; write the result; drop the checkpoint.

    Args:
        arm: what to train.
        home: the folder that paths in its recipe are relative to.
        out: the study's folder, with the shared `pack/`.
        windows: held-out windows to measure on, each of the arm's own window and target length.
    """
    folder = arm.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "recipe.json") as file:
        file.write(_record(arm).encode())
    model = fit_recipe(arm.recipe, home, folder, pack=out / "pack")
    stage = arm.recipe.compress
    if model is None or stage is None:
        raise RecipeError(f"arm {arm.name!r} trains no compressor; add `compress` to its recipe")
    context = stage.longest_window
    ids = Pack(out / "pack" / "held_out.bin").spread(windows, context + stage.target)
    result = {
        "arm": arm.name,
        "seed": arm.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": sum(record["tokens"] for record in last_records(folder)),
        "seconds": round(sum(record["minutes"] for record in last_records(folder)) * 60, 1),
        "figures": held_out_figures(model, ids, context, RATIOS),
    }
    with atomic_write(folder / "result.json") as file:
        file.write((json.dumps(result) + "\n").encode())
    for name in STAGES:
        (folder / name / "checkpoint.pt").unlink(missing_ok=True)


def finished(arm: Arm, out: Path) -> dict[str, Any] | None:
    """The arm's result, if it has one.

    Raises:
        RecipeError: the folder holds an arm of this name that was made from another recipe.
    """
    folder = arm.folder(out)
    if (folder / "recipe.json").is_file() and (folder / "recipe.json").read_text() != _record(arm):
        raise RecipeError(
            f"{folder} was made from another recipe than the study's arm {arm.name!r} is now; "
            "remove that folder or give another --out"
        )
    result = folder / "result.json"
    return json.loads(result.read_text()) if result.is_file() else None


def last_records(folder: Path) -> list[dict[str, Any]]:
    """The newest complete log record of each stage that has begun."""
    logs = [folder / stage / "log.jsonl" for stage in STAGES]
    lines = [log.read_text().splitlines(keepends=True) for log in logs if log.is_file()]
    complete = [[line for line in stage if line.endswith("\n")] for stage in lines]
    return [json.loads(stage[-1]) for stage in complete if stage]


def _record(arm: Arm) -> str:
    return arm.recipe.model_dump_json(by_alias=True, indent=1) + "\n"


def main() -> int:
    """Run the arm that the command line names."""
    study_path, out, name, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    try:
        study, home, arms = load_study(study_path)
        arm = next(arm for arm in arms if (arm.name, arm.seed) == (name, seed))
        run_arm(arm, home, out, study.windows)
    except NuggetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
