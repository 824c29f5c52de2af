"""Studies: their schema, merging, and a whole one of two tiny variants, interrupted and resumed."""

import json
from pathlib import Path

import pytest
import yaml

from nugget2d.errors import RecipeError
from nugget2d.training import loop
from research.studies import pool
from research.studies.report import COLUMNS, write_study
from research.studies.run import run_study
from research.studies.study import Variant, load_study, merge
from research.studies.variant import run_variant
from test_training import small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

STUDIES = sorted((Path(__file__).parent.parent.parent / "research" / "recipes" / "studies").glob("*.yaml"))
OFFSETS = {"use": "research.relative_offset:RelativeOffsets"}
READOUT = {"use": "research.readout_loss:ReadoutLoss", "weight": 0.5}
VARIANTS = {
    "plain": {"compress": {"plugins": []}},
    "fast": {"compress": {"optim": {"lr": 1e-2}}},
}


def small_study(folder: Path, **changes: object) -> Path:
    """Two variants over a recipe of a few steps."""
    base = yaml.safe_load(small_recipe(folder, pretrain=None, save_minutes=1e-9).read_text())
    base["compress"] |= {"tokens": 2048, "plugins": [OFFSETS, READOUT]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base))
    path = folder / "question.yaml"
    content: dict[str, object] = {
        "question": "why?",
        "base": "tiny.yaml",
        "seeds": [0],
        "windows": 4,
        "variants": VARIANTS,
    }
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path) -> None:
    study, home, variants = load_study(path)
    assert len(variants) == len(study.variants) * len(study.seeds) >= 2
    assert (home / "trial.yaml").is_file()


def test_mappings_merge_and_lists_are_replaced() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merge(base, {"a": {"c": [3]}, "e": {"f": 5}}) == {"a": {"b": 1, "c": [3]}, "d": 4, "e": {"f": 5}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_variants_change_only_what_they_name(tmp_path: Path) -> None:
    _, home, (plain, again, fast, _) = load_study(small_study(tmp_path, seeds=[3, 5]))
    assert home == tmp_path
    assert (plain.recipe.seed, again.recipe.seed) == (3, 5)
    assert plain.recipe.compress is not None and fast.recipe.compress is not None
    assert (len(plain.recipe.compress.plugins), len(fast.recipe.compress.plugins)) == (0, 2)
    optim = fast.recipe.compress.optim
    assert optim == plain.recipe.compress.optim.model_copy(update={"lr": 1e-2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key `seed`"),
        ({"seeds": [1, 1]}, "`seeds` must differ"),
        ({"base": "none.yaml"}, "cannot read recipe"),
        ({"variants": {"a/b": {}}}, "a/b"),
        (
            {"variants": {"one": {"compress": {"optim": {"rate": 1}}}}},
            "variant 'one': unknown key `compress.optim.rate`",
        ),
        ({"variants": {"one": {"tokenizer": {"vocab_size": 400}}}}, "`tokenizer`, which all variants share"),
        ({"variants": {"one": {"compress": {"minutes": 1, "tokens": None}}}}, "give `tokens` in place of `minutes`"),
        ({"variants": {"one": {}, "two": {"compress": {"tokens": 9}}}}, "'two' trains on 9 tokens, 'one' on 2,048"),
        ({"variants": {"one": {"compress": None}}}, "variant 'one'"),
        (
            {"variants": {"one": {"compress": {"plugins": [{"use": "research.nothing:X"}]}}}},
            "variant 'one': cannot import",
        ),
    ],
)
def test_errors_name_the_variant_and_the_remedy(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_study(small_study(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_study_interrupted_failing_and_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, because every variant is a process of its own that imports torch."""
    phases = [{"objectives": {"reconstruct": 1}, "windows": {32: 1}}]
    bad = {"compress": {"adapters": "lora", "phases": phases}}  # the read-out loss needs copies: found out when it runs
    path, out = small_study(tmp_path, variants=VARIANTS | {"bad": bad}), tmp_path / "out"
    _, home, (plain, *_) = load_study(path)
    log = interrupt_after(3, plain, home, out, monkeypatch)
    before = log.read_text().splitlines()

    with pytest.raises(RecipeError, match=r"variant 'bad', seed 0 ended with status 1: .*adapters: copies"):
        run_study(path, out, jobs=3)
    after = log.read_text().splitlines()
    assert (len(before), len(after)) == (3, 8)
    assert after[:3] == before  # with the very times of the first try: it went on, it did not start over
    assert "2 of 3 runs are done" in (out / "study.md").read_text()
    assert not list(out.glob("variants/plain-0/*/checkpoint.pt"))

    started: list[object] = []
    monkeypatch.setattr(pool, "_start", lambda *arguments: started.append(arguments))
    path = small_study(tmp_path)
    results = run_study(path, out, jobs=1)
    assert not started  # nothing is trained twice
    assert [(run["variant"], run["seed"], run["tokens"]) for run in results] == [("plain", 0, 2048), ("fast", 0, 2048)]
    assert results[0]["metrics"] != results[1]["metrics"]
    report = json.loads((out / "study.json").read_text())
    assert report["text"] == path.read_text() and report["runs"] == results
    assert report["summary"]["fast"]["mean"]["accuracy_4x"] == results[1]["metrics"]["accuracy_4x"]
    table = (out / "study.md").read_text()
    assert f"{100 * results[1]['metrics']['accuracy_4x']:.1f}" in table and "why?" in table and "are done" not in table
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")

    small_study(tmp_path, variants=VARIANTS | {"fast": {"compress": {"optim": {"lr": 2e-2}}}})
    with pytest.raises(RecipeError, match="another recipe"):
        run_study(path, out, jobs=1)


def interrupt_after(count: int, variant: Variant, home: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run `variant` for `count` steps; returns its log."""
    steps, left = loop._Run._step, iter(range(count))

    def some_steps(run: loop._Run) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return steps(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", some_steps)
        with pytest.raises(KeyboardInterrupt):
            run_variant(variant, home, out, 4)
    return variant.folder(out) / "compress" / "log.jsonl"


def test_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    path = small_study(tmp_path, seeds=[0, 1])
    study, _, _ = load_study(path)
    metrics = dict.fromkeys(COLUMNS, 0.5)
    runs = [
        {"variant": "plain", "seed": seed, "parameters": 1, "tokens": 10, "seconds": 60 + 60 * seed}
        | {"metrics": metrics | {"accuracy_4x": 0.25 + 0.5 * seed, "profile_20x": [1.0, seed, 0.3][: 3 - seed]}}
        for seed in (0, 1)
    ]
    write_study(tmp_path, path, study, runs)
    row = next(line for line in (tmp_path / "study.md").read_text().splitlines() if line.startswith("| plain"))
    assert row.split(" | ")[1:6] == ["2", "1", "10", "1.5", "50.0 (25.0 .. 75.0)"]
    summary = json.loads((tmp_path / "study.json").read_text())["summary"]["plain"]
    assert summary["mean"]["accuracy_4x"] == 0.5 and summary["profile_20x"] == [1.0, 0.5]
