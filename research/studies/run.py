"""A study from its file to its report: what is done is kept, what is missing is trained."""

from pathlib import Path
from typing import Any

from nugget2d.errors import RecipeError
from nugget2d.training.run import prepare_pack
from research.studies.pool import run_variants
from research.studies.report import write_study
from research.studies.study import load_study
from research.studies.variant import finished


def run_study(path: Path, out: Path, jobs: int) -> list[dict[str, Any]]:
    """Train and measure every variant that has no result yet, `jobs` at a time; returns all results, in their order.

    `out` gets `pack/`, a folder for each variant and seed under `variants/`, and the report (study.json, study.md,
    study.png), written anew whenever a variant is done.

    Raises:
        RecipeError: the study is wrong, `out` holds variants of another one, or some failed (after all others ended).
    """
    study, home, variants = load_study(path)
    waiting = [variant for variant in variants if finished(variant, out) is None]
    if waiting:
        prepare_pack(waiting[0].recipe, home, out / "pack")

    def report() -> list[dict[str, Any]]:
        results = [result for variant in variants if (result := finished(variant, out)) is not None]
        if results:
            write_study(out, path, study, results)
        return results

    failed = []
    for variant, status, output in run_variants(path, out, waiting, jobs):
        if finished(variant, out) is None:
            last = (output.read_text(errors="replace").strip() or "no message").splitlines()[-1]
            run = f"variant {variant.name!r}, seed {variant.seed}"
            failed.append(f"{run} ended with status {status}: {last} (see {output})")
        report()
    if failed:
        raise RecipeError("; ".join(failed))
    return report()
