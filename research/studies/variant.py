"""One variant of a study with one seed, in a process of its own: train, measure, write `result.json`.

python -m research.studies.variant STUDY.yaml OUT VARIANT SEED
"""

import json
import sys
from pathlib import Path
from typing import Any

from nugget2d.errors import NuggetError, RecipeError
from nugget2d.evaluation.held_out import held_out_metrics
from nugget2d.files import atomic_write
from nugget2d.training.corpus import Pack
from nugget2d.training.run import fit_recipe
from research.studies.study import Variant, load_study

RATIOS = (4, 10, 20, 40)
STAGES = ("pretrain", "compress")


def run_variant(variant: Variant, home: Path, out: Path, windows: int) -> None:
    """Train from the variant's checkpoint, if there is one; measure; write the result; drop the checkpoint.

    Args:
        variant: what to train.
        home: the folder that paths in its recipe are relative to.
        out: the study's folder, with the shared `pack/`.
        windows: held-out windows to measure on, each of the variant's own window and target length.
    """
    folder = variant.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "recipe.json") as file:
        file.write(_record(variant).encode())
    model = fit_recipe(variant.recipe, home, folder, pack=out / "pack")
    stage = variant.recipe.compress
    if model is None or stage is None:
        raise RecipeError(f"variant {variant.name!r} trains no compressor; add `compress` to its recipe")
    context = stage.longest_window
    ids = Pack(out / "pack" / "held_out.bin").spread(windows, context + stage.target)
    result = {
        "variant": variant.name,
        "seed": variant.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": sum(record["tokens"] for record in last_records(folder)),
        "seconds": round(sum(record["minutes"] for record in last_records(folder)) * 60, 1),
        "metrics": held_out_metrics(model, ids, context, RATIOS),
    }
    with atomic_write(folder / "result.json") as file:
        file.write((json.dumps(result) + "\n").encode())
    for name in STAGES:
        (folder / name / "checkpoint.pt").unlink(missing_ok=True)


def finished(variant: Variant, out: Path) -> dict[str, Any] | None:
    """The variant's result, if it has one.

    Raises:
        RecipeError: the folder holds a variant of this name that was made from another recipe.
    """
    folder = variant.folder(out)
    if (folder / "recipe.json").is_file() and (folder / "recipe.json").read_text() != _record(variant):
        raise RecipeError(
            f"{folder} was made from another recipe than the study's variant {variant.name!r} is now; "
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


def _record(variant: Variant) -> str:
    return variant.recipe.model_dump_json(by_alias=True, indent=1) + "\n"


def main() -> int:
    """Run the variant that the command line names."""
    study_path, out, name, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    try:
        study, home, variants = load_study(study_path)
        variant = next(variant for variant in variants if (variant.name, variant.seed) == (name, seed))
        run_variant(variant, home, out, study.windows)
    except NuggetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
