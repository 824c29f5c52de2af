"""Options that several commands share, so that they read and mean the same everywhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

# The core's own `StoreDtype` and `SelectionName` live beside torch and pydantic, which `--help` must not load;
# tests/test_cli.py holds these equal to them.
Dtype = Literal["float32", "bfloat16", "int8"]
Selection = Literal["learned", "window", "even", "random", "punctuation"]

DEFAULT_MODEL = "nano"

MemoryFile = Annotated[Path, typer.Argument(metavar="MEMORY.nugget", help="A memory made by `nugget2d compress`.")]
ModelName = Annotated[str, typer.Option("--model", help="Bundled model, model folder, or hub id.")]
ReaderName = Annotated[
    str | None,
    typer.Option(
        "--model", help="Bundled model, model folder, or hub id.", show_default="the model named in the memory"
    ),
]
Ratio = Annotated[float | None, typer.Option("--ratio", help="Tokens for each nugget, at least 1.", show_default="20")]
SelectionOption = Annotated[
    Selection | None, typer.Option("--selection", help="How nuggets are chosen.", show_default="the model's own")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")]
