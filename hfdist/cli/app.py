"""The program: its verbs, and what it does with errors."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated

import typer

from hfdist.cli import inspect, project, run

app = typer.Typer(
    name="hfdist",
    help="Train PyTorch models with Hessian-free optimization, on one process or many.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN, LOOK, START = "Train", "Look", "Begin"
app.command(rich_help_panel=TRAIN)(run.train)
app.command(rich_help_panel=TRAIN)(run.resume)
app.command(rich_help_panel=TRAIN)(run.evaluate)
app.command(rich_help_panel=START)(project.init)
app.command(rich_help_panel=START)(inspect.config)
app.command(rich_help_panel=START)(inspect.schema)
app.command(rich_help_panel=LOOK)(inspect.ui)
app.command(rich_help_panel=LOOK)(inspect.sync)
app.command(rich_help_panel=LOOK)(inspect.version)


@app.callback()
def _options(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks and debug messages.", envvar="HFDIST_DEBUG"),
    ] = False,
) -> None:
    if debug:
        os.environ["HFDIST_DEBUG"] = "1"
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    if debug:
        # Of hfdist alone: other libraries' debug messages drown it.
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("hfdist").setLevel(logging.DEBUG)


def main() -> None:
    """Run the program on the process's arguments; ends the process."""
    with errors_as_messages():
        app()


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """A user's mistake is one message and its exit code; Ctrl-C is 130; a traceback is for --debug."""
    try:
        yield
    except Exception as error:
        from hfdist.errors import UserError

        if not isinstance(error, UserError):
            raise
        if os.environ.get("HFDIST_DEBUG"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
