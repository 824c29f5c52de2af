"""Options that several commands share, and former names of options."""

import functools
import inspect
import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nugget2d.cli.shared import say
from nugget2d.errors import InputError

# Copies of `StoreDtype`, `SelectionName` and `EngineName`, whose modules import torch and pydantic, which `--help` must
# not load; tests/test_cli.py checks that they are equal.
Dtype = Literal["float32", "bfloat16", "int8"]
Selection = Literal["learned", "window", "even", "random", "punctuation"]
Engine = Literal["process", "ray"]

# former names of options, which work for one release
RENAMED = {
    "quality": "target-accuracy",
    "refine": "optimize-steps",
    "slots": "max-num-seqs",
    "tau": "recent-window",
}
# other arguments of what compresses and stores: no method has an option of such a name
RESERVED = frozenset({"text", "method", "ratio", "nuggets", "nbytes", "on_progress", "name", "tags", "owner"})

DEFAULT_MODEL = "nano"
DEFAULT_STORE = "~/.nugget2d/store"


def finite(param: typer.CallbackParam, value: float | None) -> float | None:
    """A number, not NaN or infinity; the callback of every option that is a float.

    Raises:
        InputError: it is not.
    """
    if value is not None and not isfinite(value):
        raise InputError(f"{param.opts[0]} takes a finite number, not {value}")
    return value


def to_write(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A name to write to, not -; the callback of every option that names a file or folder to write.

    Raises:
        InputError: it is -, by which other programs mean standard output.
    """
    if path == Path("-"):
        raise InputError(f"{param.opts[0]} takes a name, and - is not standard output here; give another one")
    return path


MemoryFile = Annotated[Path, typer.Argument(metavar="MEMORY.nugget", help="A memory made by `nugget2d compress`.")]
ModelName = Annotated[str, typer.Option("--model", help="Bundled model, folder, hub id, or .gguf file.")]
ReaderName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Bundled model, folder, hub id, or .gguf file.",
        show_default="the memory's, if it is on this machine",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How to compress; `nugget2d methods` lists them.",
        show_default="nugget2d if the model was trained for it, else knorm",
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        callback=finite,
        help="Tokens for each nugget, at least 1.",
        show_default="20 for nugget2d, 5 for others",
    ),
]
Nuggets = Annotated[int | None, typer.Option("--nuggets", help="Tokens to keep, in place of a ratio.")]
Bytes = Annotated[int | None, typer.Option("--bytes", help="Bytes of states to keep, in place of a ratio.")]
TargetAccuracy = Annotated[
    float | None,
    typer.Option(
        "--target-accuracy",
        callback=finite,
        help="Choose each segment's ratio: this share of its tokens must be reconstructed (nugget2d).",
    ),
]
OptimizeSteps = Annotated[
    int | None,
    typer.Option(
        "--optimize-steps",
        help="Gradient steps on the nuggets, up to --target-accuracy or 1 (nugget2d).",
    ),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Also store what is needed to reconstruct the identical text (nugget2d).")
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another option of the method; may be given several times."),
]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="How to store the states.", show_default="int8")]
SelectionOption = Annotated[
    Selection | None, typer.Option("--selection", help="How nuggets are chosen.", show_default="the model's own")
]
Temperature = Annotated[
    float, typer.Option("--temperature", callback=finite, help="0 takes the likeliest token every time.")
]
Seed = Annotated[
    int, typer.Option("--seed", min=-(1 << 63), max=(1 << 63) - 1, help="Makes sampling repeatable.", metavar="INTEGER")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")]
StorePlace = Annotated[
    str, typer.Option("--store", envvar="NUGGET2D_STORE", metavar="FOLDER|URL", help="Folder, or s3://bucket/prefix.")
]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A word to filter by; may be given several times.")]
Tag = Annotated[str | None, typer.Option("--tag", help="Only memories with this tag.")]


def current_option(name: str) -> str:
    """The current name of an option, without dashes; warns of a former one. Click calls it for what users type."""
    if name not in RENAMED:
        return name
    say("warning", f"--{name} is now --{RENAMED[name]}")
    return RENAMED[name]


def compress_arguments(
    *,
    method: MethodName = None,
    ratio: Ratio = None,
    nuggets: Nuggets = None,
    nbytes: Bytes = None,
    target_accuracy: TargetAccuracy = None,
    optimize_steps: OptimizeSteps = None,
    exact: Exact = False,
    dtype: DtypeOption = None,
    selection: SelectionOption = None,
    more: MethodOptions = None,
) -> dict[str, Any]:
    """Those of these options that were given, as arguments of `Nugget2D.compress`; `more` are the `--set` ones.

    Raises:
        InputError: one of `more` is not NAME=VALUE.
    """
    given = {
        name: value for name, value in locals().items() if name != "more" and value is not None and value is not False
    }
    for one in more or ():
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--set takes NAME=VALUE, not {one!r}")
        if name in RESERVED:
            raise InputError(f"--set takes options of the method, and {name} is none; `nugget2d methods` lists them")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return given


def takes_compress_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with every option of `compress_arguments` in the place of its parameter `options`, which gets them."""
    own = list(inspect.signature(command).parameters.values())
    shared = list(inspect.signature(compress_arguments).parameters.values())
    place = [parameter.name for parameter in own].index("options")
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*own[:place], *shared, *own[place + 1 :])
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = compress_arguments(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(**given, options=options)

    # typer makes a command line of both
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
