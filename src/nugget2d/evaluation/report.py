"""Benchmark reports as JSON with their environment (versions, hardware, commit), and Markdown tables."""

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nugget2d.config import Frozen
from nugget2d.errors import InputError, OutputError
from nugget2d.evaluation.intervals import Estimate
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


def metric_text(metric: Estimate, digits: int, scale: float = 1) -> str:
    """A metric and its interval, if it has one."""
    value = f"{scale * metric['value']:.{digits}f}"
    if metric["low"] is None or metric["high"] is None:
        return value
    return f"{value} [{scale * metric['low']:.{digits}f}, {scale * metric['high']:.{digits}f}]"


def make_folder(folder: Path) -> None:
    """Make the folder of a report, if it is missing.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {folder}: {error.strerror or error}") from error


def load_report(path: Path, settings: Frozen, parts: Sequence[str]) -> dict[str, Any] | None:
    """The report in `path`, if there is one and it has these settings.

    Args:
        path: of a JSON file.
        settings: what the report must have been measured with.
        parts: other keys that it must have.

    Raises:
        InputError: it is no such report, or one of other settings.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        theirs, mine = report["settings"], settings.model_dump(mode="json")
        different = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        for part in parts:
            report[part]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a report; choose another folder, or pass --force") from error
    if different:
        raise InputError(
            f"{path} was measured with other settings ({', '.join(different)}); "
            "choose another folder, or pass --force to start over"
        )
    return report


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
