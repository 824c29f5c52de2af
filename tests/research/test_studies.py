"""Studies: their schema, merging, and a whole one of two tiny arms, interrupted and resumed."""

import json
from pathlib import Path

import pytest
import yaml

from nugget2d.errors import RecipeError
from nugget2d.studies import pool
from nugget2d.studies.arm import run_arm
from nugget2d.studies.report import COLUMNS, write_study
from nugget2d.studies.run import run_study
from nugget2d.studies.study import Arm, load_study, merge
from nugget2d.training import loop
from test_training import small_recipe

STUDIES = sorted((Path(__file__).parent.parent / "recipes" / "studies").glob("*.yaml"))
ARMS = {
    "plain": {"compress": {"addressing": False, "readout": 0}},
    "fast": {"compress": {"optim": {"lr": 1e-2}}},
}


def small_study(folder: Path, **changes: object) -> Path:
    """Two arms over a recipe of a few steps."""
    base = yaml.safe_load(small_recipe(folder, pretrain=None, save_minutes=1e-9).read_text())
    base["compress"] |= {"tokens": 2048}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base))
    path = folder / "question.yaml"
    content: dict[str, object] = {"question": "why?", "base": "tiny.yaml", "seeds": [0], "windows": 4, "arms": ARMS}
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path) -> None:
    study, home, arms = load_study(path)
    assert len(arms) == len(study.arms) * len(study.seeds) >= 2
    assert (home / "trial.yaml").is_file()


def test_mappings_merge_and_lists_are_replaced() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merge(base, {"a": {"c": [3]}, "e": {"f": 5}}) == {"a": {"b": 1, "c": [3]}, "d": 4, "e": {"f": 5}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_arms_change_only_what_they_name(tmp_path: Path) -> None:
    _, home, (plain, again, fast, _) = load_study(small_study(tmp_path, seeds=[3, 5]))
    assert home == tmp_path
    assert (plain.recipe.seed, again.recipe.seed) == (3, 5)
    assert plain.recipe.compress is not None and fast.recipe.compress is not None
    assert (plain.recipe.compress.addressing, fast.recipe.compress.addressing) == (False, True)
    optim = fast.recipe.compress.optim
    assert optim == plain.recipe.compress.optim.model_copy(update={"lr": 1e-2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key `seed`"),
        ({"seeds": [1, 1]}, "`seeds` must differ"),
        ({"base": "none.yaml"}, "cannot read recipe"),
        ({"arms": {"a/b": {}}}, "a/b"),
        ({"arms": {"one": {"compress": {"optim": {"rate": 1}}}}}, "arm 'one': unknown key `compress.optim.rate`"),
        ({"arms": {"one": {"tokenizer": {"vocab_size": 400}}}}, "`tokenizer`, which all arms share"),
        ({"arms": {"one": {"compress": {"minutes": 1, "tokens": None}}}}, "give `tokens` in place of `minutes`"),
        ({"arms": {"one": {}, "two": {"compress": {"tokens": 9}}}}, "'two' trains on 9 tokens, 'one' on 2,048"),
        ({"arms": {"one": {"compress": None}}}, "arm 'one'"),
    ],
)
def test_errors_name_the_arm_and_the_remedy(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_study(small_study(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_study_interrupted_failing_and_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, because every arm is a process of its own that imports torch."""
    phases = [{"objectives": {"reconstruct": 1}, "windows": {32: 1}}]
    bad = {"compress": {"adapters": "lora", "phases": phases}}  # read-out needs copies: found out when the arm runs
    path, out = small_study(tmp_path, arms=ARMS | {"bad": bad}), tmp_path / "out"
    _, home, (plain, *_) = load_study(path)
    log = interrupt_after(3, plain, home, out, monkeypatch)
    before = log.read_text().splitlines()

    with pytest.raises(RecipeError, match=r"arm 'bad', seed 0 ended with status 1: .*adapters: copies"):
        run_study(path, out, jobs=3)
    after = log.read_text().splitlines()
    assert (len(before), len(after)) == (3, 8)
    assert after[:3] == before  # with the very times of the first try: it went on, it did not start over
    assert "2 of 3 runs are done" in (out / "study.md").read_text()
    assert not list(out.glob("arms/plain-0/*/checkpoint.pt"))

    started: list[object] = []
    monkeypatch.setattr(pool, "_start", lambda *arguments: started.append(arguments))
    path = small_study(tmp_path)
    results = run_study(path, out, jobs=1)
    assert not started  # nothing is trained twice
    assert [(run["arm"], run["seed"], run["tokens"]) for run in results] == [("plain", 0, 2048), ("fast", 0, 2048)]
    assert results[0]["figures"] != results[1]["figures"]
    report = json.loads((out / "study.json").read_text())
    assert report["text"] == path.read_text() and report["runs"] == results
    assert report["summary"]["fast"]["mean"]["accuracy_4x"] == results[1]["figures"]["accuracy_4x"]
    table = (out / "study.md").read_text()
    assert f"{100 * results[1]['figures']['accuracy_4x']:.1f}" in table and "why?" in table and "are done" not in table
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")

    small_study(tmp_path, arms=ARMS | {"fast": {"compress": {"optim": {"lr": 2e-2}}}})
    with pytest.raises(RecipeError, match="another recipe"):
        run_study(path, out, jobs=1)


def interrupt_after(count: int, arm: Arm, home: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run `arm` for `count` steps; returns its log."""
    steps, left = loop._Run._step, iter(range(count))

    def some_steps(run: loop._Run) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return steps(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", some_steps)
        with pytest.raises(KeyboardInterrupt):
            run_arm(arm, home, out, 4)
    return arm.folder(out) / "compress" / "log.jsonl"


def test_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    path = small_study(tmp_path, seeds=[0, 1])
    study, _, _ = load_study(path)
    figures = dict.fromkeys(COLUMNS, 0.5)
    runs = [
        {"arm": "plain", "seed": seed, "parameters": 1, "tokens": 10, "seconds": 60 + 60 * seed}
        | {"figures": figures | {"accuracy_4x": 0.25 + 0.5 * seed, "profile_20x": [1.0, seed, 0.3][: 3 - seed]}}
        for seed in (0, 1)
    ]
    write_study(tmp_path, path, study, runs)
    row = next(line for line in (tmp_path / "study.md").read_text().splitlines() if line.startswith("| plain"))
    assert row.split(" | ")[1:6] == ["2", "1", "10", "1.5", "50.0 (25.0 .. 75.0)"]
    summary = json.loads((tmp_path / "study.json").read_text())["summary"]["plain"]
    assert summary["mean"]["accuracy_4x"] == 0.5 and summary["profile_20x"] == [1.0, 0.5]
