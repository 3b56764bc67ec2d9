"""doctor: what could go wrong with a job, before it does."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdist.cli.options import JobFile, Json, Overrides

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig
    from hfdist.training.doctor import Finding


def doctor(
    job: JobFile,
    overrides: Overrides = None,
    steps: Annotated[
        int,
        typer.Option(help="Steps that are taken to measure memory and seconds; 0: none.", min=0),
    ] = 2,
    as_json: Json = False,
) -> None:
    """Look a job over: task, loss, gradient, product, cost of a step, MLflow, Ray; a fix for each finding.

    The job is not trained: what its steps write is thrown away. Exit code 0: nothing is wrong; 1: something
    is, and the table says what; 2: the job file itself cannot be read.
    """
    from hfdist.config.job import load_config
    from hfdist.training.doctor import examine

    config = load_config(job, overrides or ())
    findings = examine(config)
    may_run = all(finding.status != "wrong" for finding in findings)
    if may_run and steps:
        findings.append(_cost(config, steps))
    findings += [_output(config), _tracking(config), *_ray(config)]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        _print(findings)
    if any(finding.status == "wrong" for finding in findings):
        raise typer.Exit(1)


def _cost(config: RunConfig, steps: int) -> Finding:
    """Memory and seconds of steps at the job's number of workers, on this machine."""
    from hfdist import api
    from hfdist.config.checkpoint import CheckpointConfig
    from hfdist.config.evaluate import EvaluateConfig
    from hfdist.config.tracking import TrackingConfig
    from hfdist.errors import UserError
    from hfdist.rundir import files
    from hfdist.training.doctor import Finding

    launch, workers = config.launch, config.launch.max_workers
    is_elsewhere = launch.backend == "ray"
    if is_elsewhere:
        launch = dataclasses.replace(launch, backend="local", workers=1)
    with tempfile.TemporaryDirectory() as folder:
        trial = config.model_copy(
            update={
                "steps": steps,
                "output": folder,
                "launch": launch,
                "tracking": TrackingConfig(enabled=False),
                "checkpoint": CheckpointConfig(every=steps + 1),
                "evaluate": EvaluateConfig(every=0),
            }
        )
        try:
            result = api.train(trial, run_id="doctor")
        except UserError as error:
            return Finding(
                check="step",
                status="wrong",
                text=str(error),
                fix="correct what the message names; --debug shows more",
            )
        lines = (Path(folder) / "doctor" / files.METRICS).read_text().splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    seconds, peak = last.get("seconds/total"), last.get("peak_memory_bytes", 0.0)
    at = f"{launch.max_workers} worker(s) of this machine" + (
        f", of the {workers} that the job asks Ray for" if is_elsewhere else ""
    )
    text = (
        f"{seconds:.3g} s a step at {at}, {peak / 2**20:,.0f} MiB a worker, of which the solver's vectors "
        f"{last.get('solver_bytes', 0.0) / 2**20:,.0f} MiB; loss {last['loss']:.5g} -> "
        f"{last['final_loss']:.5g}"
    )
    if result["status"] != "FINISHED" or not last["accepted"]:
        return Finding(
            check="step",
            status="note",
            text=f"{text}; step {steps} was rejected",
            fix="a few rejected steps at the start find the damping; if it goes on, look at loss and data",
        )
    return Finding(check="step", status="ok", text=text)


def _output(config: RunConfig) -> Finding:
    from hfdist import api
    from hfdist.checkpoint import mirror
    from hfdist.errors import UserError
    from hfdist.rundir.locations import is_address
    from hfdist.training.doctor import Finding

    try:
        mirror.check_writable(config.output)
        if not is_address(config.output):
            folder = Path(config.output).expanduser()
            is_new = not folder.exists()
            with api.output_folder(folder):
                pass
            if is_new:
                folder.rmdir()
    except UserError as error:
        return Finding(check="output", status="wrong", text=str(error), fix="output=ANOTHER_FOLDER")
    return Finding(check="output", status="ok", text=f"{config.output} can be written")


def _tracking(config: RunConfig) -> Finding:
    from hfdist.errors import UserError
    from hfdist.rundir.locations import folder_of_runs
    from hfdist.tracking.reach import where_recorded
    from hfdist.training.doctor import Finding

    try:
        text = where_recorded(config.tracking, folder_of_runs(config.output))
    except UserError as error:
        return Finding(
            check="MLflow",
            status="note",
            text=str(error),
            fix="start the server, or correct tracking.uri and MLFLOW_TRACKING_URI; a run would keep "
            "its record "
            "and deliver it by `hfdist sync`",
        )
    return Finding(check="MLflow", status="ok", text=text)


def _ray(config: RunConfig) -> list[Finding]:
    """Whether the job's Ray cluster answers and has what it asks for."""
    if config.launch.backend != "ray":
        return []
    import os

    from hfdist.errors import UserError
    from hfdist.training.doctor import Finding

    if not (config.launch.address or os.environ.get("RAY_ADDRESS")):
        return [
            Finding(
                check="Ray", status="ok", text="a cluster of this machine's own, made for the run"
            )
        ]
    from hfdist.launch.ray.cluster import connected, node_resources

    try:
        with connected(config.launch.address):
            nodes = node_resources()
    except UserError as error:
        return [Finding(check="Ray", status="wrong", text=str(error), fix="hfdist cluster --help")]
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    text = f"{len(nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs"
    needed = config.launch.max_workers * config.launch.cpus_per_worker
    if needed > cpus:
        return [
            Finding(
                check="Ray",
                status="wrong",
                text=f"{text}, but {config.launch.max_workers} workers need {needed:g} CPUs",
                fix="lower launch.workers or launch.cpus_per_worker, or add nodes",
            )
        ]
    return [Finding(check="Ray", status="ok", text=text)]


_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def _print(findings: list[Finding], console: Any = None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("check", "", "finding", "fix"):
        table.add_column(column, overflow="fold", no_wrap=column in ("check", ""))
    for finding in findings:
        table.add_row(
            finding.check,
            Text(finding.status, style=_STYLES[finding.status]),
            Text(finding.text),
            Text(finding.fix),
        )
    if console.is_terminal:
        console.print(table)
    else:
        print(_lines(findings))


def _lines(findings: list[Finding]) -> str:
    """One line a finding, for pipes."""
    return "\n".join(
        f"{finding.check}: {finding.status}: {finding.text}"
        + (f" -- fix: {finding.fix}" if finding.fix else "")
        for finding in findings
    )
