"""The pages: links, words, line lengths, file names, and examples that run."""

import ast
import json
import re
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import tiny
from nugget2d import Nugget2D
from nugget2d.methods.registry import METHODS

ROOT = Path(__file__).parent.parent
CARD = ROOT / "src" / "nugget2d" / "models" / "nano" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", CARD, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted((ROOT / "research").glob("*.md"))]
CONTRIBUTING = (ROOT / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")

# words of this project's own, and what the field says
PRIVATE = {
    r"spell(s|ed|ing)?\b": "decode tokens",
    r"imagin(e|es|ing)\b": "sampled continuations",
    r"voice loss|heard": "value-matching loss, captured activations",
    r"lookups?\b|looks? tokens up": "induction head",
    r"addressing": "relative-offset initialisation",
    r"whole tokens": "uncompressed tokens",
    r"thinning|allot": "eviction",
    r"(?<!the )figures?\b": "metrics, results",
    r"\barms?\b": "variant",
    r"faultless": "exact match",
    r"going on|goes on|gone on|go on\b": "continue",
    r"\brooms\b": "modules",
    r"why in one line": "exits with a one-line error message",
    r"pays from|has paid": "break-even",
    r"talks? nonsense|\bdrown|lend(s|ing)? the memory": "the measured effect",
}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def written(page: Path) -> str:
    """A page without the tables that benchmarks made: these keep the names that results were recorded by."""
    return re.sub(r"<!-- table .*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def prose(page: Path) -> list[str]:
    """The lines of a page that are neither a table's nor code."""
    text = re.sub(r"```.*?```", "", written(page), flags=re.DOTALL)
    return [line for line in text.splitlines() if not line.startswith(("|", "    "))]


def example(name: str) -> str:
    """The code block of CONTRIBUTING.md that a comment names."""
    (found,) = re.findall(rf"( *)<!-- example {name} -->\n *```\w+\n(.*?)\n *```", CONTRIBUTING, flags=re.DOTALL)
    return "\n".join(line.removeprefix(found[0]) for line in found[1].splitlines()) + "\n"


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_words_are_those_of_the_field(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(
        r"<!-- table .*?<!-- end -->", "", text, flags=re.DOTALL
    )  # results keep the names they were recorded by
    history = page.name == "CHANGELOG.md"  # which names what was renamed
    text = re.sub(r"`[^`\n]*`" if history else r"`[^`\n]*[./_=-][^`\n]*`", "", text)
    found = {private: match[0] for private in PRIVATE if (match := re.search(private, text, flags=re.IGNORECASE))}
    assert not found, {match: PRIVATE[private] for private, match in found.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page: Path) -> None:
    assert [line for line in prose(page) if len(line) > 120] == []


def test_files_of_the_architecture_exist() -> None:
    source = ROOT / "src" / "nugget2d"
    names = set(re.findall(r"`((?:\w+/)*\w+\.py)`", ARCHITECTURE))
    assert len(names) > 40
    for name in names:
        somewhere = (ROOT / name).exists() or (source / name).exists() or any(source.rglob(name))
        assert somewhere, name


def test_the_layers_are_those_of_the_contract() -> None:
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = ast.literal_eval(re.findall(r"^layers = (\[.*?\n\])", contracts, flags=re.DOTALL | re.MULTILINE)[0])
    expected = [part for layer in layers if layer != "__main__" for part in re.split(r" [|:] ", layer)]
    shown = re.findall(r"<!-- layers -->\n```text\n(.*?)```", ARCHITECTURE, flags=re.DOTALL)[0]
    columns = [re.split(r"\s{2,}", line)[0] for line in shown.splitlines()]
    assert [part for line in columns for part in re.split(r" \| |, ", line)] == expected


# ---- examples of CONTRIBUTING.md ----


def test_the_method_of_the_example_works_by_its_row_alone(llama: Nugget2D, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, object] = {"__name__": "every"}
    exec(compile(example("method"), "every.py", "exec"), space)
    monkeypatch.setitem(METHODS, "every", space["Every"])
    memory = llama.compress(tiny.TEXT, method="every", ratio=4)
    assert memory.method.name == "every" and memory.num_nuggets == -(-memory.num_tokens // 4)
    gaps = {after - before for before, after in zip(memory.positions, memory.positions[1:], strict=False)}
    assert gaps <= {3, 4, 5}
    full = llama.score(" peas", memory=llama.compress(tiny.TEXT, method="every", ratio=1))
    assert full == pytest.approx(llama.score(" peas", prompt=tiny.TEXT), abs=1e-3)
    assert len(example("method").splitlines()) <= 20


def test_the_command_of_the_example_prints_a_size(llama: Nugget2D, tmp_path: Path) -> None:
    space: dict[str, object] = {"__name__": "size"}
    exec(compile(example("command"), "size.py", "exec"), space)
    command = typer.Typer()
    command.command()(space["size"])
    memory = llama.compress(tiny.TEXT, ratio=4)
    memory.save(tmp_path / "a.nugget")
    assert CliRunner().invoke(command, [str(tmp_path / "a.nugget")]).stdout == f"{memory.nbytes:,}\n"


@pytest.mark.slow
def test_the_task_of_the_example_is_answered(
    llama: Nugget2D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recall.yaml").write_text(example("task"))
    rows = [
        {"context": tiny.TEXT[:200], "question": f"Which {n}?", "choices": [" a", " b", " c"], "answer": n % 3}
        for n in range(4)
    ]
    (tmp_path / "recall.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Nugget2D, "from_pretrained", lambda name: llama)
    exec(compile(example("compare"), "compare.py", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {
        words[0]: float(words[1]) for words in lines if len(words) == 2 and words[0] in ("full", "memory", "none")
    }
    assert printed.keys() == {"full", "memory", "none"}
    assert all(0 <= accuracy <= 1 for accuracy in printed.values())


# ---- habits ----


def test_markers_are_used(pytestconfig: pytest.Config) -> None:
    registered = {marker.partition(":")[0] for marker in pytestconfig.getini("markers")}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    for name in ("slow", "e2e"):
        assert name in registered and any(f"pytest.mark.{name}" in text for text in sources)


def test_hooks_need_no_network() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "mypy"}
    assert all(hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks)
