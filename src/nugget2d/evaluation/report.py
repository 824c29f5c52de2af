"""What a figure depends on besides the code: written into every benchmark's JSON."""

import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nugget2d.files import atomic_write

_PACKAGES = ("nugget2d", "torch", "transformers", "tokenizers", "numpy", "sacrebleu", "zstandard")


def environment() -> dict[str, Any]:
    """Time, commit, versions, processor and thread count of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "hardware": device,
        "threads": torch.get_num_threads(),
    }


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Write results with their environment as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps({"environment": environment(), **results}, indent=1) + "\n").encode())


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; floats with two digits."""

    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # of an extra that is not installed
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return f"{len(names)} x {names[0]}" if names else platform.machine()
