"""The program: its verbs, and what it does with errors."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from hfdist.cli import bench, cluster, jobs, look, project, run, submit, sweep
from hfdist.launch.logs import StderrHandler

app = typer.Typer(
    name="hfdist",
    help="Train PyTorch models with Hessian-free optimization, on one process or many.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Begin": (project.init, look.config, look.schema),
    "Train": (run.train, run.resume, run.evaluate),
    "Look": (look.ui, look.sync, look.version),
    "Cluster": (submit.submit, sweep.sweep),
}


def _help(verb: Callable[..., None]) -> str:
    """The docstring without the line breaks of the source inside its paragraphs."""
    paragraphs = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


for panel, verbs in _VERBS.items():
    for verb in verbs:
        app.command(rich_help_panel=panel, help=_help(verb))(verb)
app.add_typer(bench.app, name="bench", rich_help_panel="Look")
for name, family in {"jobs": jobs.app, "cluster": cluster.app}.items():
    app.add_typer(family, name=name, rich_help_panel="Cluster")


@app.callback()
def _options(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Show tracebacks and debug messages.", envvar="HFDIST_DEBUG", metavar=""
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print versions and exit.",
            metavar="",
            is_eager=True,
            callback=look.print_version,
        ),
    ] = False,
) -> None:
    os.environ.pop("HFDIST_DEBUG", None)
    if debug:
        os.environ["HFDIST_DEBUG"] = "1"  # the workers' processes see it, too
    for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "true")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Debug messages of hfdist alone: those of other libraries drown them.
    handler.setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("hfdist").setLevel(logging.DEBUG if debug else logging.NOTSET)


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
