"""config, schema, ui, sync, version: looking at jobs and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfdist.cli.run import Overrides


def config(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved job: the file, the changes, and every default."""
    from hfdist.config import load_config, to_yaml

    print(to_yaml(load_config(job, overrides or ())), end="")


def schema() -> None:
    """Print the JSON schema of job files, for editors."""
    import json

    from hfdist.config import schema as job_schema

    print(json.dumps(job_schema(), indent=2))


def ui(
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Open the MLflow UI on the runs of a folder (Ctrl-C ends it)."""
    from hfdist.tracking.ui import serve

    serve(output, host=host, port=port)


def sync(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's folder.")],
) -> None:
    """Deliver to the tracking server what it has not got yet."""
    from hfdist.tracking import sync as deliver

    print(f"delivered {deliver(run_dir)} events of {run_dir}")


def version() -> None:
    """Print versions."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    from hfdist import __version__

    print(f"hfdist {__version__}")
    for package in ("torch", "backpack-for-pytorch", "ray", "mlflow"):
        try:
            print(f"{package} {version_of(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
