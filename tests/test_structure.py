"""The shape of the code: imports run one way."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LINT, "--config", str(config)], cwd=ROOT, capture_output=True, text=True, check=False)


def test_imports_keep_the_contract() -> None:
    result = lint_imports(ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_broken_contract_is_noticed(tmp_path: Path) -> None:
    """The contract upside down: else the test above would pass whatever the code does."""
    contract = (ROOT / "pyproject.toml").read_text().split("[tool.importlinter]")[1]
    assert contract.count('"memory",') == 1
    upside_down = contract.replace('"memory",', "").replace('"errors",', '"errors", "memory",')
    config = tmp_path / "pyproject.toml"
    config.write_text("[tool.importlinter]" + upside_down)
    result = lint_imports(config)
    assert result.returncode != 0
    assert "nugget2d.memory.memory -> nugget2d.errors" in result.stdout


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, nugget2d; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_checkpoints_load_by_transformers() -> None:
    """Where `trust_remote_code=False` is given: left out, transformers asks on standard input."""
    loads = re.compile(r"\b(auto|Auto(Config|Tokenizer|ModelForCausalLM))\.from_pretrained\(")
    found = [path for folder in ("src", "research") for path in (ROOT / folder).rglob("*.py")]
    found = [path for path in found if loads.search(path.read_text(encoding="utf-8"))]
    assert sorted(path.name for path in found) == ["base.py", "gguf.py"]
