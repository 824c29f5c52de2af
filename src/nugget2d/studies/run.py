"""A study from its file to its report: what is done is kept, what is missing is trained."""

from pathlib import Path
from typing import Any

from nugget2d.errors import RecipeError
from nugget2d.studies.arm import finished
from nugget2d.studies.pool import run_arms
from nugget2d.studies.report import write_study
from nugget2d.studies.study import load_study
from nugget2d.training.run import prepare_pack


def run_study(path: Path, out: Path, jobs: int) -> list[dict[str, Any]]:
    """Train and measure every arm that has no result yet, `jobs` at a time; returns all results, in the study's order.

    `out` gets `pack/`, a folder for each arm and seed under `arms/`, and the report (study.json, study.md, study.png),
    written anew whenever an arm is done.

    Raises:
        RecipeError: the study is wrong, `out` holds arms of another one, or arms failed (after all others ended).
    """
    study, home, arms = load_study(path)
    waiting = [arm for arm in arms if finished(arm, out) is None]
    if waiting:
        prepare_pack(waiting[0].recipe, home, out / "pack")

    def report() -> list[dict[str, Any]]:
        results = [result for arm in arms if (result := finished(arm, out)) is not None]
        if results:
            write_study(out, path, study, results)
        return results

    failed = []
    for arm, status, output in run_arms(path, out, waiting, jobs):
        if finished(arm, out) is None:
            last = (output.read_text(errors="replace").strip() or "no message").splitlines()[-1]
            failed.append(f"arm {arm.name!r}, seed {arm.seed} ended with status {status}: {last} (see {output})")
        report()
    if failed:
        raise RecipeError("; ".join(failed))
    return report()
