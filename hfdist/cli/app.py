"""The program: its commands, and how errors are shown."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hfdist.cli import bench, cluster, doctor, jobs, look, project, run, submit, sweep
from hfdist.launch.logs import StderrHandler


class _FlagsWithoutType:
    """Help that shows no type (`<bool>`) beside options that take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_FlagsWithoutType, TyperCommand):
    pass


class _Group(_FlagsWithoutType, TyperGroup):
    pass


EXIT_CODES = """Exit codes: 0 done; 1 the run failed, or trained nothing; 2 a mistake in the command, the
job, the task or the data; 130 stopped by Ctrl-C or SIGTERM, after a checkpoint."""

app = typer.Typer(
    name="hfdist",
    help="Train PyTorch models with Hessian-free optimization, on one process or many.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    cls=_Group,
    epilog=EXIT_CODES.replace("\n", " "),
    context_settings={"help_option_names": ["-h", "--help"]},
)

_VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Begin": (project.init, doctor.doctor, look.config, look.schema),
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
        app.command(rich_help_panel=panel, help=_help(verb), cls=_Command)(verb)
for name, family, panel in (
    ("bench", bench.app, "Look"),
    ("jobs", jobs.app, "Cluster"),
    ("cluster", cluster.app, "Cluster"),
):
    for registered in family.registered_commands:
        registered.cls = _Command
    app.add_typer(family, name=name, rich_help_panel=panel, cls=_Group)


@app.callback()
def _options(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks and debug messages.", envvar="HFDIST_DEBUG"),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print versions and exit.",
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
    """Every error is one message and its exit code; Ctrl-C is 130; a traceback is for --debug."""
    try:
        yield
    except Exception as error:
        from hfdist.addresses import without_user_information
        from hfdist.errors import UserError, first_line

        if os.environ.get("HFDIST_DEBUG"):
            print(without_user_information(traceback.format_exc()), file=sys.stderr)
        if isinstance(error, UserError):
            message, code = str(error), error.exit_code
        elif isinstance(error, OSError) and error.strerror:
            about = [str(name) for name in (error.filename, error.filename2) if name is not None]
            message, code = ": ".join([*map(_short, about), error.strerror]), 2
        else:
            kind, said = type(error).__name__, without_user_information(first_line(error))
            message = f"unexpected {kind}: {said} (a fault of hfdist: --debug shows where)"
            code = 1
        print(f"error: {message or type(error).__name__}", file=sys.stderr, flush=True)
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}"
