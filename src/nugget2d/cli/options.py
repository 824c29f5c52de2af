"""Options that several commands share, so that they read and mean the same everywhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

# The core's own `StoreDtype`, `SelectionName` and `EngineName` live beside torch and pydantic, which `--help` must not
# load; tests/test_cli.py holds these equal to them.
Dtype = Literal["float32", "bfloat16", "int8"]
Selection = Literal["learned", "window", "even", "random", "punctuation"]
Engine = Literal["process", "ray"]

DEFAULT_MODEL = "nano"
DEFAULT_STORE = "~/.nugget2d/store"

MemoryFile = Annotated[Path, typer.Argument(metavar="MEMORY.nugget", help="A memory made by `nugget2d compress`.")]
ModelName = Annotated[str, typer.Option("--model", help="Bundled model, model folder, or hub id.")]
ReaderName = Annotated[
    str | None,
    typer.Option(
        "--model", help="Bundled model, model folder, or hub id.", show_default="the model named in the memory"
    ),
]
Ratio = Annotated[float | None, typer.Option("--ratio", help="Tokens for each nugget, at least 1.", show_default="20")]
Quality = Annotated[
    float | None,
    typer.Option("--quality", help="Choose each segment's ratio: this share of its tokens must read back right."),
]
Refine = Annotated[
    int,
    typer.Option(
        "--refine", metavar="STEPS", help="Improve the nuggets by gradient steps, until --quality or all is right."
    ),
]
Exact = Annotated[bool, typer.Option("--exact", help="Also keep what makes the very same text come back.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="How to keep the states.", show_default="the model's precision")
]
SelectionOption = Annotated[
    Selection | None, typer.Option("--selection", help="How nuggets are chosen.", show_default="the model's own")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")]
StorePlace = Annotated[
    str, typer.Option("--store", envvar="NUGGET2D_STORE", metavar="FOLDER|URL", help="Folder, or s3://bucket/prefix.")
]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A word to filter by; may be given several times.")]
Tag = Annotated[str | None, typer.Option("--tag", help="Only memories with this tag.")]
