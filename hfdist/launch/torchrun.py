"""One worker of a group that torchrun (or anything that sets its variables) has started."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.launch.logs import logging_to_file

if TYPE_CHECKING:
    from hfdist.comm import Communicator
    from hfdist.config.job import RunConfig


def run(config: RunConfig, *, run_dir: Path, resume: bool, display: str) -> dict[str, Any]:
    """Join the group and work; see `hfdist.launch.start`. All use rank 0's folder.

    A group that torchrun restarts continues from the newest checkpoint.
    """
    import torch

    from hfdist.comm.environment import GroupCommunicator, join_environment, record_failure
    from hfdist.devices import resolve, use
    from hfdist.launch.folder import run_folder

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    try:
        device = resolve(config.device, local_rank, local_world_size)
        use(device)
        if config.launch.threads_per_worker is not None:
            torch.set_num_threads(config.launch.threads_per_worker)
        join_environment(config.launch.timeout_seconds)
        comm = GroupCommunicator(device, config.launch.timeout_seconds)
        try:
            run_dir, resume = comm.broadcast_object((run_dir, resume or is_restart()))
            if not comm.is_rank_0:
                with logging_to_file(run_dir, comm.rank):
                    return _work(config, run_dir, resume, comm, "quiet")
            with run_folder(config, run_dir), logging_to_file(run_dir, comm.rank):
                return _work(config, run_dir, resume, comm, display)
        finally:
            comm.close()
    except BaseException as error:
        record_failure(error)
        raise


def _work(
    config: RunConfig, run_dir: Path, resume: bool, comm: Communicator, display: str
) -> dict[str, Any]:
    from hfdist.training.display import make_display
    from hfdist.training.worker import Job
    from hfdist.training.worker import run as run_worker

    job = Job(config=config, run_dir=run_dir, resume=resume)
    return run_worker(job, comm, make_display(display))


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun has started this group before."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_rank_0(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its group, or of none."""
    return int(environ.get("RANK", "0")) == 0


def run_id_of_group(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """A run id that is the same after a restart of the group; None outside of torchrun.

    Made of torchrun's --rdzv-id, or of machine, process id and start time of the agent, which outlives
    the workers.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    id_ = environ["TORCHELASTIC_RUN_ID"]
    if id_ in ("", "none"):
        id_ = f"{os.uname().nodename}:{os.getppid()}:{_started(os.getppid())}"
    return f"{name}-{hashlib.sha256(id_.encode()).hexdigest()[:8]}"


def _started(pid: int) -> str:
    """When a process started: process ids are reused."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
