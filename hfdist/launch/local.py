"""Workers on this machine: one in this process, or several as processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.launch.logs import logging_to_file

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig


def run(config: RunConfig, *, run_dir: Path, resume: bool, display: str) -> dict[str, Any]:
    """Run the job here; see `hfdist.launch.start`."""
    if config.launch.max_workers == 1 and config.launch.max_failures == 0:
        return run_alone(config, run_dir=run_dir, resume=resume, display=display)
    from hfdist.launch.group import run_group

    return run_group(config, run_dir=run_dir, resume=resume, display=display)


def run_alone(config: RunConfig, *, run_dir: Path, resume: bool, display: str) -> dict[str, Any]:
    """World size one, in this process."""
    import torch

    from hfdist.comm import SerialCommunicator
    from hfdist.devices import resolve
    from hfdist.training.display import make_display
    from hfdist.training.worker import Job
    from hfdist.training.worker import run as run_worker

    if config.launch.threads_per_worker is not None:
        torch.set_num_threads(config.launch.threads_per_worker)
    comm = SerialCommunicator(resolve(config.device, local_rank=0))
    with logging_to_file(run_dir, 0):
        job = Job(config=config, run_dir=run_dir, resume=resume)
        return run_worker(job, comm, make_display(display))
