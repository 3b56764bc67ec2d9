"""A worker process of a local group: `python -m hfdist.launch.child FD PARENT`, started by `group.py`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is told at its start."""

    rank: int
    world_size: int
    threads: int
    init_method: str
    config: RunConfig
    run_dir: Path
    resume: bool
    display: str


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The worker has joined the process group."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The worker is done: the content of result.json, on rank 0."""

    result: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The worker's own error. Text only: not every exception survives a pipe."""

    error_class: str
    message: str
    traceback: str
    is_user_error: bool
    is_interrupt: bool = False

    @classmethod
    def by(cls, error: BaseException) -> Failed:
        """What an exception says."""
        from hfdist.errors import UserError

        return cls(
            error_class=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            is_user_error=isinstance(error, UserError),
            is_interrupt=isinstance(error, KeyboardInterrupt),
        )


def main() -> None:
    """Receive the assignment, work, report, and end without waiting for other ranks."""
    descriptor, parent = map(int, sys.argv[1:])
    os.set_inheritable(descriptor, False)
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, _interrupt)  # until the worker's own handlers are there
    connection = Connection(descriptor)
    assignment: Assignment = connection.recv()
    threading.Thread(target=_watch, args=(connection,), daemon=True).start()
    try:
        answer: Finished | Failed = Finished(result=_work(assignment, connection))
    except BaseException as error:
        answer = Failed.by(error)
        _write_to_log(assignment, answer)
    connection.send(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    # After an error the usual exit may hang: threads, process groups, devices.
    os._exit(0 if isinstance(answer, Finished) else 1)


def _work(job: Assignment, connection: Connection) -> dict[str, Any]:
    import torch

    from hfdist.comm.environment import join
    from hfdist.devices import resolve, use
    from hfdist.launch.logs import logging_to_file
    from hfdist.training.display import make_display
    from hfdist.training.worker import Job, run

    torch.set_num_threads(job.threads)
    device = resolve(job.config.device, job.rank, job.world_size)
    use(device)
    with logging_to_file(job.run_dir, job.rank, to_stderr=job.rank == 0):
        comm = join(
            device,
            rank=job.rank,
            world_size=job.world_size,
            init_method=job.init_method,
            timeout_seconds=job.config.launch.timeout_seconds,
        )
        connection.send(Joined())
        display = make_display(job.display if job.rank == 0 else "quiet")
        return run(
            Job(config=job.config, run_dir=job.run_dir, resume=job.resume),
            comm,
            display,
        )


def _write_to_log(assignment: Assignment, failed: Failed) -> None:
    from hfdist.launch.logs import path_of

    try:
        with path_of(assignment.run_dir, assignment.rank).open("a") as file:
            file.write(failed.traceback)
    except OSError:
        pass  # a full disk must not hide the error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when `parent` ends, even by SIGKILL (Linux; elsewhere the closed
    connection shows it)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _watch(connection: Connection) -> None:
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    # As itself, not as __main__, so that its messages can be read elsewhere.
    from hfdist.launch import child

    child.main()
