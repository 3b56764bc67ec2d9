"""jobs: list, status, logs, stop, delete."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from hfdist.cli.options import Address, Json
from hfdist.cli.tables import print_table

app = typer.Typer(
    help="Jobs of a Ray cluster: list, status, logs, stop, delete.", no_args_is_help=True
)
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job.")]


@app.command("list")
def list_(
    address: Address = None,
    queue: Annotated[
        bool,
        typer.Option("--queue", help="Those that run, and those that wait: their place and why."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the jobs, the newest first."""
    from hfdist.launch.ray import jobs as ray_jobs

    where = ray_jobs.dashboard_address(address)
    if queue:
        _show_queue(ray_jobs.list_queue(where), as_json)
        return
    jobs = ray_jobs.list_jobs(where)
    if as_json:
        _print_json(jobs)
        return
    rows = [
        {
            "job": job["id"],
            "status": job["status"],
            "task": job["task"],
            "steps": job["steps"],
            "experiment": job["experiment"],
            "started": _clock(job["started"]),
            "took": _took(job),
        }
        for job in jobs
    ]
    if rows:
        print_table(rows, dispensable=("experiment", "task", "steps", "took", "started"))
    else:
        print("no jobs")


@app.command()
def status(job: JobId, address: Address = None, as_json: Json = False) -> None:
    """Show a job: how it stands, or how it ended."""
    from hfdist.launch.ray import jobs as ray_jobs

    _show(ray_jobs.status(job, ray_jobs.dashboard_address(address)), as_json)


@app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay until the job has ended.")
    ] = False,
) -> None:
    """Show what a job has printed."""
    from hfdist.launch.ray import jobs as ray_jobs

    where = ray_jobs.dashboard_address(address)
    if follow:
        follow_to_the_end(job, where)
    else:
        print(ray_jobs.logs(job, where), end="")


@app.command()
def stop(
    job: JobId,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="Stay until it has stopped.")] = True,
    as_json: Json = False,
) -> None:
    """Stop a job after a checkpoint; `hfdist resume ID --address ...` goes on with it."""
    from hfdist.launch.ray import jobs as ray_jobs

    where = ray_jobs.dashboard_address(address)
    stopped = ray_jobs.stop(job, where)
    while wait and stopped["status"] in ("PENDING", "RUNNING"):
        time.sleep(0.5)
        stopped = ray_jobs.status(job, where)
    _show(stopped, as_json)


@app.command()
def delete(job: JobId, address: Address = None) -> None:
    """Forget a job that has ended; the run's folder stays."""
    from hfdist.launch.ray import jobs as ray_jobs

    ray_jobs.delete(job, ray_jobs.dashboard_address(address))
    print(f"deleted {job}")


def follow_to_the_end(job: str, address: str) -> None:
    """Print what a job prints, and end as it does: with its exit code."""
    import asyncio

    from hfdist.launch.ray import jobs as ray_jobs

    async def show() -> None:
        async for text in ray_jobs.follow(job, address):
            print(text, end="", flush=True)

    ray_jobs.status(job, address)  # an unknown job is one message
    try:
        asyncio.run(show())
        ended = ray_jobs.status(job, address)
        while ended["status"] in ("PENDING", "RUNNING"):
            time.sleep(0.5)
            ended = ray_jobs.status(job, address)
    except KeyboardInterrupt:
        print(f"\nthe job goes on: hfdist jobs stop {job} --address {address}", file=sys.stderr)
        sys.exit(130)
    if ended["status"] == "STOPPED":
        sys.exit(130)
    if ended["status"] != "SUCCEEDED":
        if ended["exit_code"] is None and ended["message"]:
            print(f"error: {ended['message']}", file=sys.stderr)
        sys.exit(ended["exit_code"] or 1)


def _show_queue(jobs: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(jobs)
        return
    rows = [
        {
            "place": job["place"],
            "job": job["id"],
            "state": job["state"],
            "priority": job["priority"],
            "user": job["user"],
            "label": job["label"],
            "submitted": _clock(job["started"]),
        }
        for job in jobs
    ]
    if not rows:
        print("no job runs or waits")
        return
    print_table(rows, dispensable=("submitted", "label", "user", "priority"))
    for job in jobs:
        if job["reason"]:
            print(f"{job['id']}: {job['reason']}")


def _show(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(job)
        return
    for key, value in job.items():
        if value is not None:
            print(f"{key + ':':<12}{_clock(value) if key in ('started', 'ended') else value}")


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value))


def _clock(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))


def _took(job: dict[str, Any]) -> str:
    if not job["started"]:
        return ""
    seconds = int((job["ended"] or 1000 * time.time()) / 1000 - job["started"] / 1000)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
