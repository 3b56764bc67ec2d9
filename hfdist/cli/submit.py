"""submit: a run as a job of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfdist.cli.options import Address, Json, Overrides


def submit(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay, and show what the run prints.")
    ] = False,
    run_id: Annotated[
        str | None, typer.Option(help="Name of the run; by default made of name and time.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder that travels with the job; by default the job file's."),
    ] = None,
    max_size: Annotated[float, typer.Option(help="Megabytes that may travel.")] = 100.0,
    priority: Annotated[
        int, typer.Option(help="Jobs that wait go in this order, the highest first.")
    ] = 0,
    label: Annotated[str, typer.Option(help="Name of a group of jobs, for --at-most.")] = "",
    at_most: Annotated[
        int | None,
        typer.Option(help="Wait while so many jobs of the label, or else of this user, run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Submit a job to a Ray cluster, with the folder it lies in.

    What .gitignore ignores stays behind. [bold]output[/] must be a folder that all nodes see.

    Where others take the cluster's resources the job waits: [bold]hfdist jobs list --queue[/] says its
    place and why.
    """
    from hfdist.rundir.locations import check_run_id

    if run_id is not None:
        check_run_id(run_id)  # before anything slow is loaded
    from hfdist import api
    from hfdist.config.job import load_config
    from hfdist.errors import ConfigError
    from hfdist.launch.ray import jobs as ray_jobs
    from hfdist.launch.ray import queue

    if not 0.0 < max_size < float("inf"):
        raise ConfigError(f"max-size is {max_size:g}: it must be a number of megabytes above 0")
    place = queue.metadata(priority, label, at_most)
    config = load_config(job, [*(overrides or ()), "launch.backend=ray"])
    folder = (folder or job.parent).resolve()
    if not job.resolve().is_relative_to(folder):
        raise ConfigError(f"job file {job} is not in the folder {folder} that travels with it")
    run_id = api.new_run_id(config.name) if run_id is None else run_id
    address = ray_jobs.dashboard_address(address)
    submitted = ray_jobs.submit(
        job,
        overrides or (),
        address=address,
        run_id=run_id,
        config=config,
        folder=folder,
        max_size=int(max_size * 1e6),
        place=place,
    )
    _announce(submitted, address, as_json, follow)


def resume_job(
    run_id: str, overrides: list[str] | None, address: str, follow: bool, as_json: bool
) -> None:
    """Submit the continuation of a run."""
    from hfdist.launch.ray import jobs as ray_jobs
    from hfdist.rundir import files
    from hfdist.rundir.locations import is_address

    address = ray_jobs.dashboard_address(address)
    path = Path(run_id)
    run_dir = str(path.resolve()) if (path / files.JOB).is_file() else None
    if is_address(run_id):
        run_dir = run_id
    submitted = ray_jobs.resume(
        path.resolve().name if run_dir else run_id,
        overrides or (),
        address=address,
        run_dir=run_dir,
    )
    _announce(submitted, address, as_json, follow)


def _announce(submitted: object, address: str, as_json: bool, follow: bool) -> None:
    import json

    from hfdist.cli.jobs import follow_to_the_end

    values = vars(submitted)
    if as_json:
        print(json.dumps(values), flush=True)
    else:
        print(f"job:       {values['job_id']}")
        print(f"dashboard: {values['dashboard']}")
        print(f"mlflow:    {values['mlflow'] or _file_store(values['run_dir'])}")
        print(f"results:   {values['run_dir']}", flush=True)
        if not follow:
            at = f"--address {address}"
            print(f"watch it:  hfdist jobs logs -f {values['job_id']} {at}")
            print(f"stop it:   hfdist jobs stop {values['job_id']} {at}", flush=True)
    if follow:
        follow_to_the_end(values["job_id"], address)


def _file_store(run_dir: str) -> str:
    return f"hfdist ui --output {run_dir.rpartition('/')[0]}"
