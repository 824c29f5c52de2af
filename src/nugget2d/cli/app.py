"""The `nugget2d` command: its sub-commands, error handling and former option names.

Nothing imported here may import torch, transformers or pydantic, so that `nugget2d --help` is fast.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nugget2d import __version__
from nugget2d.cli.bench import bench
from nugget2d.cli.chat import chat
from nugget2d.cli.compress import compress
from nugget2d.cli.demo import demo
from nugget2d.cli.doctor import doctor
from nugget2d.cli.generate import generate
from nugget2d.cli.index import index
from nugget2d.cli.inspect import inspect
from nugget2d.cli.methods import methods
from nugget2d.cli.options import current_option
from nugget2d.cli.reconstruct import reconstruct
from nugget2d.cli.serve import serve
from nugget2d.cli.shared import INTERRUPTED, say
from nugget2d.cli.stdio import guarded, prepare
from nugget2d.cli.store import store
from nugget2d.cli.train import train
from nugget2d.errors import InputError, NuggetError


class Commands(TyperGroup):
    """Turns errors that users cause into a one-line message and an exit code; other errors keep their traceback."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the command line; help and messages on wrong usage are written here."""
        with guarded():
            return super().main(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            with guarded():
                _require_working_folder()
                return super().invoke(ctx)
        except NuggetError as error:
            say("error", str(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            say("error", "interrupted")
            raise typer.Exit(INTERRUPTED) from error


def _require_working_folder() -> None:
    """Libraries ask for it, and every relative path is below it."""
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(f"cannot use the working folder: {error.strerror}; change to another one") from error


app = typer.Typer(
    name="nugget2d",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress long texts into small memories (nuggets) that a language model reads.",
    context_settings={"token_normalize_func": current_option},
)
for command in (compress, methods, reconstruct, generate, chat, inspect, index, train, serve, demo, doctor):
    app.command()(command)
app.add_typer(store)
app.add_typer(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nugget2d {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    prepare()
    app()
