"""`nugget2d train`: runs a training recipe."""

from pathlib import Path
from typing import Annotated

import typer

from nugget2d.cli.options import to_write
from nugget2d.cli.shared import safe_to_interrupt


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, on what, for how long.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=to_write, help="Folder for the results.", show_default="the recipe's own"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
) -> None:
    """Train a language model and its compressor from a recipe, resuming if it was interrupted."""
    with safe_to_interrupt():
        from nugget2d.training.run import train as run

    run(recipe, out=out, fresh=fresh)
