"""The `nugget2d` command: its sub-commands, error handling and former option names.

Nothing imported here may import torch, transformers or pydantic, so that `nugget2d --help` is fast.
"""

import errno
import os
import sys
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
from nugget2d.cli.store import store
from nugget2d.cli.train import train
from nugget2d.errors import NuggetError


class Commands(TyperGroup):
    """Turns errors that users cause into a one-line message and an exit code; other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except NuggetError as error:
            say("error", str(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            say("error", "interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # the reader (`| head`) has closed the pipe
            _discard_stdout()
            raise typer.Exit(1) from error
        except OSError as error:
            # a full disk, under redirected standard output; other files raise OutputError
            if error.errno != errno.ENOSPC:
                raise
            say("error", f"cannot write {error.filename or 'standard output'}: {error.strerror}; free some space")
            _discard_stdout()
            raise typer.Exit(1) from error


def _discard_stdout() -> None:
    """Redirect stdout to the null device: Python flushes it at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    app()
