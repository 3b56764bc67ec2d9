"""train, resume, evaluate."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from hfdist.cli.options import JobFile, Json, Overrides, Plain, Quiet, RunDir, Trust


def train(
    job: JobFile,
    overrides: Overrides = None,
    run_id: Annotated[
        str | None,
        typer.Option(
            help="Name of the run's folder; by default made of the job's name and the time.",
            metavar="ID",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    plain: Plain = False,
) -> None:
    """Train a job; its results are in OUTPUT/RUN_ID.

    Ctrl-C abandons the step in progress, writes a checkpoint and ends with exit code 130; then
    [bold]hfdist resume[/] goes on.

    On several machines: [bold]torchrun ... -m hfdist train JOB.yaml[/] on each.
    """
    from hfdist import api

    result = api.train(job, overrides or (), display=_display(quiet, as_json, plain), run_id=run_id)
    exit_as(result)


def resume(
    run_dir: RunDir,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Go on as a job of this cluster: RUN_DIR may be the run's name there.",
            metavar="http://HEAD:8265",
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="With --address: show what it prints."),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    plain: Plain = False,
    trust: Trust = False,
) -> None:
    """Go on with a run from its newest checkpoint.

    The result is the same as without the interruption. Changes, such as steps=100, are saved with
    the run.

    This runs the code that the run names: of a run that somebody gave you, read its config.yaml and its
    task first.
    """
    if address is not None:
        from hfdist.cli.submit import resume_job

        resume_job(str(run_dir), overrides, address, follow, as_json)
        return
    from hfdist import api
    from hfdist.cli.trust import check_trust

    check_trust(run_dir, overrides, trust)
    exit_as(api.resume(run_dir, overrides or (), display=_display(quiet, as_json, plain)))


def evaluate(
    run_dir: RunDir,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str, typer.Option(help="A step's number, best or newest.", metavar="WHICH")
    ] = "newest",
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Print loss and metrics of a run's checkpoint on the evaluation data.

    This runs the code that the run names: of a run that somebody gave you, read its config.yaml and its
    task first.
    """
    import json

    from hfdist.cli.trust import check_trust
    from hfdist.errors import ConfigError
    from hfdist.training.worker import evaluate_run

    if checkpoint not in ("newest", "best") and not checkpoint.isdecimal():
        raise ConfigError(
            f"checkpoint is {checkpoint!r}: it must be a step's number, best or newest"
        )
    which: Any = int(checkpoint) if checkpoint.isdecimal() else checkpoint
    check_trust(run_dir, overrides, trust)
    values = evaluate_run(run_dir, None if which == "newest" else which, overrides or ())
    if as_json:
        print(json.dumps(values))
        return
    for key, value in values.items():
        print(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}")


def _display(quiet: bool, as_json: bool, plain: bool) -> str:
    if quiet + as_json + plain > 1:
        from hfdist.errors import ConfigError

        raise ConfigError("choose one of --quiet, --json and --plain")
    return "quiet" if quiet else "json" if as_json else "plain" if plain else "auto"


def exit_as(result: dict[str, Any]) -> None:
    """End as the run did."""
    if result["status"] == "FAILED":
        print(f"error: {result.get('error', 'the run failed')}", file=sys.stderr, flush=True)
        sys.exit(1)
    if result["status"] == "KILLED":
        sys.exit(130)
