"""config, schema, ui, sync, version: looking at jobs and runs."""

from __future__ import annotations

from typing import Annotated

import typer

from hfdist.cli.options import JobFile, Overrides, RunDir


def config(
    job: JobFile,
    overrides: Overrides = None,
) -> None:
    """Print the resolved job: the file, the changes, and every default.

    Passwords and tokens are masked.
    """
    from hfdist.config.job import load_config, to_yaml

    print(to_yaml(load_config(job, overrides or ())), end="")


def schema() -> None:
    """Print the JSON schema of job files, for editors.

    With "# yaml-language-server: $schema=schema.json" at the top of a job file, many editors complete
    and check its keys.
    """
    import json

    from hfdist.config.job import schema as job_schema

    print(json.dumps(job_schema(), indent=2))


def ui(
    output: Annotated[
        str, typer.Option(help="Folder of the runs, or their address.", metavar="DIR")
    ] = "runs",
    port: Annotated[int, typer.Option(help="Port on this machine.", metavar="PORT")] = 5000,
    host: Annotated[
        str, typer.Option(help="Address to listen on.", metavar="ADDRESS")
    ] = "127.0.0.1",
) -> None:
    """Open the MLflow UI on the runs of a folder.

    Ctrl-C ends it. Only this machine can reach it unless --host says otherwise.
    """
    from hfdist.tracking.ui import serve

    serve(output, host=host, port=port)


def sync(
    run_dir: RunDir,
    uri: Annotated[
        str | None,
        typer.Option(
            help="Another server or store than the run's own; it is told everything.", metavar="URI"
        ),
    ] = None,
) -> None:
    """Deliver to the tracking server what it has not got yet.

    For runs that ended while the server was away.
    """
    from hfdist import api

    count = api.sync(run_dir, uri)
    print(
        f"delivered {count} events of {run_dir}" if count else f"{run_dir}: nothing was left to do"
    )


def version() -> None:
    """Print versions of hfdist and of what it stands on."""
    print_version(True)


def print_version(wanted: bool) -> None:
    """Print versions and end the program, if wanted."""
    if not wanted:
        return
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from hfdist import __version__

    print(f"hfdist {__version__}\npython {platform.python_version()}")
    for package in ("torch", "backpack-for-pytorch", "ray", "mlflow"):
        try:
            print(f"{package} {version_of(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
    raise typer.Exit
