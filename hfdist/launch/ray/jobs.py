"""Runs as jobs of a Ray cluster: submitted from anywhere, watched, stopped, and gone on with."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.errors import ConfigError, first_line
from hfdist.launch.ray import queue
from hfdist.launch.ray.package import copy_files, files_of
from hfdist.launch.ray.token import use_token
from hfdist.rundir.locations import check_run_id, folder_of_runs, is_address, is_run_id
from hfdist.tracking.provenance import SOURCE_VARIABLE, digest, source

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from hfdist.config.job import RunConfig

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
FOLDER = ".hfdist"
"""Folder of the package that holds what hfdist itself needs."""
MAX_SIZE = 100_000_000
"""Bytes that a job may carry, unless told otherwise."""
# A stop lets the step in progress end and a checkpoint be written.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that report every upload."""
_AGENT_WAIT = 120.0  # seconds that a new head's agent may take to come up
_CREDENTIALS = ("MLFLOW_TRACKING_", "AWS_", "MLFLOW_S3_", "HFDIST_NOTIFY_")
_OF_CLIENTS = ("MLFLOW_WORKSPACE",)
"""Other variables that go with a job."""
_DESCRIBED = ("task", "steps", "experiment", "priority", "label", "at_most", "user")
_PLACE = ("queue", "priority", "label", "at_most", "user", "turn_at")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What the job's driver finds in its package. A file, because command lines, variables and metadata
    of a job are shown to everybody who may look at the cluster."""

    run_id: str
    run_dir: str
    job_id: str = ""
    job: str | None = None
    """The job file in the package; None to go on with the run."""
    overrides: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Where a submitted run can be looked at."""

    job_id: str
    run_id: str
    run_dir: str
    dashboard: str
    mlflow: str | None
    bytes: int


def dashboard_address(address: str | None) -> str:
    """The address of a cluster's dashboard: given, Ray's own variable, or this machine's."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    return address if "://" in address else f"http://{address}"


@contextmanager
def jobs_of(address: str) -> Iterator[JobSubmissionClient]:
    """A client of the cluster's jobs; its errors are told as the user's mistakes.

    Raises:
        ConfigError: The cluster does not answer, does not accept the user, or does not know the job.
    """
    use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield JobSubmissionClient(address)
    except (RuntimeError, ConnectionError, ValueError, AuthenticationError) as error:
        text = str(error)
        if found := re.search(r"Job (\S+) does not exist", text):
            raise ConfigError(
                f"the cluster at {address} has no job {found[1]}: see `hfdist jobs list`"
            ) from error
        # The last line that says something: servers end their answers with tracebacks and stops.
        if found := re.search(r"submission_id (\S+) already exists", text):  # of two at a time
            raise ConfigError(
                f"the cluster has a job {found[1]} already: choose another --run-id"
            ) from error
        lines = [line.strip() for line in text.splitlines() if re.search(r"\w{3}", line)]
        reason = lines[-1] if lines else f"{type(error).__name__}, and no more"
        if isinstance(error, AuthenticationError) or re.search(r"uthenticat|code 40[13]", text):
            raise ConfigError(
                f"the cluster at {address} does not accept this user: put its token into "
                "~/.ray/auth_token with mode 0600, or name its file in RAY_AUTH_TOKEN_PATH"
            ) from error
        if isinstance(error, ConnectionError) or "Failed to connect" in text:
            raise ConfigError(
                f"no Ray dashboard answers at {address}: name the head's with --address "
                "http://HEAD:8265, or start one with `hfdist cluster start-head`"
            ) from error
        raise ConfigError(f"the cluster at {address} says: {reason}") from error


def submit(
    job: Path,
    overrides: Sequence[str],
    *,
    address: str,
    run_id: str,
    config: RunConfig,
    folder: Path,
    max_size: int = MAX_SIZE,
    place: Mapping[str, str] | None = None,
) -> Submitted:
    """Submit a run.

    Args:
        job: The job file, in `folder`.
        overrides: Changes of it.
        address: The cluster's dashboard.
        run_id: Name of the run, and of the job.
        config: The job as it resolves here.
        folder: The user's folder: what .gitignore does not ignore travels with the job.
        max_size: Bytes that may.
        place: In the queue, see `queue.metadata`.

    Raises:
        ConfigError: The run's name is none, the folder is too large, or the cluster refuses.
    """
    check_run_id(run_id)
    runs = folder_of_runs(config.output)
    output = config.output.rstrip("/") if is_address(config.output) else str(runs)
    files = files_of(folder, [runs])
    # Neither git nor the repository goes with the job.
    code = source(folder) | {"hfdist.source.package_sha256": digest(folder, files)}
    submission = Submission(
        run_id=run_id,
        run_dir=f"{output}/{run_id}",
        job_id=run_id,
        job=str(job.resolve().relative_to(folder.resolve())),
        overrides=[*overrides, f"output={output}"],
        environment=_credentials() | {SOURCE_VARIABLE: json.dumps(code)},
    )
    metadata = {
        "task": config.task.rpartition("/")[2],
        "steps": str(config.steps),
        "experiment": config.tracking.experiment,
        **(queue.metadata() if place is None else place),
    }
    with tempfile.TemporaryDirectory(prefix="hfdist-job-") as package:
        size = copy_files(folder, files, Path(package), max_size)
        return _send(
            submission,
            run_id,
            Path(package),
            address,
            metadata,
            _link(config, runs, run_id),
            size,
        )


def resume(
    run_id: str, overrides: Sequence[str] = (), *, address: str, run_dir: str | None = None
) -> Submitted:
    """Submit the continuation of a run that has stopped or failed, as ID-2, ID-3, ...

    Args:
        run_id: The run, or any of its jobs.
        overrides: Changes, such as more `steps`.
        address: The cluster's dashboard.
        run_dir: The run's folder, if the cluster does not know the run (it is a new one).

    Raises:
        ConfigError: The cluster does not know the run, or it is still going on.
    """
    check_run_id(run_id)
    with jobs_of(address) as client:
        known = [details for details in client.list_jobs() if _is_of(details, run_id)]
    active = [details for details in known if details.status not in _ENDED]
    if active:
        raise ConfigError(
            f"run {run_id} goes on as job {active[0].submission_id}: `hfdist jobs stop "
            f"{active[0].submission_id}` stops it"
        )
    metadata: dict[str, str] = {}
    for details in known:
        metadata |= details.metadata or {}
    run_id = metadata.pop("run_id", run_id)
    run_dir = run_dir or metadata.get("run_dir")
    if run_dir is None:
        raise ConfigError(f"the cluster at {address} knows no run {run_id}: see `hfdist jobs list`")
    numbers = [int(m[1]) for d in known if (m := re.search(r"-r(\d+)$", d.submission_id or ""))]
    job_id = f"{run_id}-r{max(numbers, default=1) + 1}"
    submission = Submission(
        run_id=run_id,
        run_dir=run_dir,
        job_id=job_id,
        overrides=list(overrides),
        environment=_credentials(),
    )
    described = queue.metadata() | {k: metadata[k] for k in _DESCRIBED if k in metadata}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in ("steps", "task"):
            described[key] = value
    with tempfile.TemporaryDirectory(prefix="hfdist-job-") as package:
        return _send(
            submission,
            job_id,
            Path(package),
            address,
            described,
            metadata.get("mlflow"),
            0,
        )


def _send(
    submission: Submission,
    job_id: str,
    package: Path,
    address: str,
    metadata: Mapping[str, str],
    mlflow: str | None,
    size: int,
) -> Submitted:
    file = package / FOLDER / "submission.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(vars(submission)))
    file.chmod(0o600)
    words = [submission.job] if submission.job else ["--resume", submission.run_id]
    with jobs_of(address) as client:
        if any(details.submission_id == job_id for details in client.list_jobs()):
            raise ConfigError(
                f"the cluster has a job {job_id} already: choose another --run-id, or go on with it by "
                f"`hfdist resume {job_id} --address {address}`"
            )
        _submitted(
            client,
            entrypoint=shlex.join(["python", "-m", "hfdist.cli.submitted", *words]),
            submission_id=job_id,
            runtime_env={"working_dir": str(package), "env_vars": dict(_STOP)},
            metadata={
                **metadata,
                "run_id": submission.run_id,
                "run_dir": submission.run_dir,
                **({"mlflow": mlflow} if mlflow else {}),
            },
        )
    return Submitted(
        job_id=job_id,
        run_id=submission.run_id,
        run_dir=submission.run_dir,
        dashboard=f"{address.rstrip('/')}/#/jobs/{job_id}",
        mlflow=mlflow,
        bytes=size,
    )


def _submitted(client: JobSubmissionClient, **job: Any) -> None:
    """Submit, waiting for the agent of a head that has only just started."""
    deadline = time.monotonic() + _AGENT_WAIT
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


# -- looking and stopping ------------------------------------------------------------------------------


def describe(details: JobDetails) -> dict[str, Any]:
    """A job in plain values."""
    metadata = details.metadata or {}
    return {
        "id": details.submission_id,
        "status": str(details.status.value),
        "run_id": metadata.get("run_id"),
        "task": metadata.get("task"),
        "steps": int(steps) if (steps := metadata.get("steps") or "").isdigit() else None,
        "experiment": metadata.get("experiment"),
        "started": details.start_time,
        "ended": details.end_time or None,
        "exit_code": details.driver_exit_code,
        "message": details.message,
        "run_dir": metadata.get("run_dir"),
        "mlflow": metadata.get("mlflow"),
    }


def list_queue(address: str) -> list[dict[str, Any]]:
    """The jobs that have not ended: those that run, then those that wait, in their order; see
    `queue.listed`."""
    with jobs_of(address) as client:
        found = [
            describe(d) | {"queue": {k: v for k, v in (d.metadata or {}).items() if k in _PLACE}}
            for d in client.list_jobs()
            if d.submission_id
        ]
    return queue.listed(found)


def list_jobs(address: str) -> list[dict[str, Any]]:
    """All submitted jobs of a cluster, the newest first."""
    with jobs_of(address) as client:
        found = [describe(details) for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: -(job["started"] or 0))


def status(job_id: str, address: str) -> dict[str, Any]:
    """One job."""
    with jobs_of(address) as client:
        return describe(client.get_job_info(_in_address(job_id)))


def logs(job_id: str, address: str) -> str:
    """What the driver has printed so far."""
    with jobs_of(address) as client:
        return client.get_job_logs(_in_address(job_id))


async def follow(job_id: str, address: str) -> AsyncIterator[str]:
    """What the driver prints, as it does."""
    with jobs_of(address) as client:
        async for text in client.tail_job_logs(_in_address(job_id)):
            yield text


def stop(job_id: str, address: str) -> dict[str, Any]:
    """Ask a job to stop: its workers end the step, write a checkpoint, and the run is KILLED."""
    with jobs_of(address) as client:
        try:
            client.stop_job(_in_address(job_id))
        except RuntimeError as error:
            if "404" not in str(error):
                raise
            client.get_job_info(_in_address(job_id))  # an unknown job is another message
            raise ConfigError(
                f"job {job_id} cannot be stopped, as it never began: `hfdist jobs delete` removes it"
            ) from error
    return status(job_id, address)


def delete(job_id: str, address: str) -> None:
    """Forget a job that has ended, or that will never begin; the run's folder stays.

    Raises:
        ConfigError: There is no such job, or it is running.
    """
    with jobs_of(address) as client:
        known = {details.submission_id: details for details in client.list_jobs()}
        if job_id not in known:
            raise ConfigError(
                f"the cluster at {address} has no job {job_id}: see `hfdist jobs list`"
            )
        status = str(known[job_id].status.value)
        if status == "RUNNING":
            is_waiting = (known[job_id].metadata or {}).get("queue") == "waiting"
            raise ConfigError(
                f"job {job_id} is {'waiting in the queue' if is_waiting else 'running'}: `hfdist jobs stop "
                f"{job_id} --address {address}` stops it, then it can be deleted"
            )
        if status in _ENDED and is_run_id(job_id):
            client.delete_job(job_id)
            return
        with contextlib.suppress(RuntimeError):  # Ray cannot name it, or it has no driver
            client.stop_job(_in_address(job_id))
        _forget(client, job_id)


def _forget(client: JobSubmissionClient, job_id: str) -> None:
    """Have the cluster itself take a job out of its table: Ray deletes only what it can stop."""
    helper = f"forget-{secrets.token_hex(4)}"
    entry = shlex.join(["python", "-m", "hfdist.launch.ray.forget", job_id])
    _submitted(client, entrypoint=entry, submission_id=helper)
    deadline = time.monotonic() + _AGENT_WAIT
    while str(client.get_job_status(helper).value) not in _ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    status = str(client.get_job_status(helper).value)
    said = client.get_job_logs(helper)
    for _ in range(5):  # Ray's watch over a job that has just ended may write it down once more
        with contextlib.suppress(RuntimeError):
            client.delete_job(helper)
        time.sleep(1.5)
        if not any(details.submission_id == helper for details in client.list_jobs()):
            break
    if any(details.submission_id == job_id for details in client.list_jobs()):
        raise ConfigError(
            f"job {job_id} cannot be forgotten (the cluster's own job for it is {status}): "
            f"{first_line(said) if said.strip() else 'it said nothing'}"
        )


# -- helpers -------------------------------------------------------------------------------------------


def _in_address(job_id: str) -> str:
    """A job's id as a part of an address."""
    return urllib.parse.quote(job_id, safe="")


def _is_of(details: JobDetails, run_id: str) -> bool:
    return run_id in (details.submission_id, (details.metadata or {}).get("run_id"))


def _credentials() -> dict[str, str]:
    return {
        key: value
        for key, value in os.environ.items()
        if key.startswith(_CREDENTIALS) or key in _OF_CLIENTS
    }


def _link(config: RunConfig, output: Path, run_id: str) -> str | None:
    from hfdist.tracking.links import run_link

    return run_link(config.tracking, output, run_id)
