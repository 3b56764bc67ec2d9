"""What runs on a cluster: the function of each worker, and the controller's answer to a failure."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.train import UserCallback, get_context, get_preemption_info
from ray.train.torch import TorchConfig
from ray.train.torch import config as torch_config

from hfdist.checkpoint import mirror
from hfdist.checkpoint.storage import open_storage
from hfdist.comm.environment import serve_store
from hfdist.errors import ConfigError, StorageError, SupersededError
from hfdist.launch.child import Failed
from hfdist.launch.logs import logging_to_file, path_of
from hfdist.launch.ray.failures import first_failure
from hfdist.launch.ray.loopback import is_loopback
from hfdist.launch.ray.relay import RelayDisplay, RelayHandler
from hfdist.launch.ray.spares import keep_one
from hfdist.rundir import files
from hfdist.rundir.locations import home_of, is_address

if TYPE_CHECKING:
    import torch

    from hfdist.comm import Communicator
    from hfdist.config.job import RunConfig
    from hfdist.config.launch import LaunchConfig
    from hfdist.training.display import Display

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every worker is told."""

    config: RunConfig
    run_dir: Path
    resume: bool
    threads: int
    gpus_per_worker: float
    relay: Any
    """Handle of the `Relay` actor."""
    folder: Path
    """The driver's working folder: paths in the job may be relative to it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the driver that workers need. Passed as data: a runtime environment is shown to
    everybody who may look at the cluster."""


class DoNotRetry(Exception):
    """Ends a run in the controller: another try would repeat the mistake."""


class FailureWatch(UserCallback):
    """Tells the driver of failures, and ends the run for those that are the user's mistake.

    Args:
        relay: Handle of the `Relay` actor.
    """

    def __init__(self, relay: Any) -> None:
        self._relay = relay

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        import ray

        failures: dict[int, tuple[Failed, float]] = ray.get(self._relay.failures.remote())
        nodes: dict[int, str] = ray.get(self._relay.nodes.remote())
        _GroupBackend.has_failed = True
        cause = first_failure(failures, worker_exceptions, nodes)
        ray.get(self._relay.down.remote(cause))
        for failed, _ in failures.values():
            if is_mistake(failed):
                raise DoNotRetry(failed.message)


_Backend: Any = TorchConfig().backend_cls


class _GroupBackend(_Backend):
    has_failed = False
    """Whether a worker of the present group has; in the controller's process there is one group at a time."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        _GroupBackend.has_failed = False
        module: Any = torch_config
        ordinary = module._setup_torch_process_group
        module._setup_torch_process_group = set_up_group  # what workers are told to call
        try:
            super().on_start(worker_group, backend_config)
        finally:
            module._setup_torch_process_group = ordinary

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        if _GroupBackend.has_failed:
            # Survivors wait for the lost one when they leave the group: seconds, and they end anyway.
            return
        try:
            super().on_shutdown(worker_group, backend_config)
        except RayError as error:
            logger.debug("the process group was not shut down cleanly: %s", error)


class GroupConfig(TorchConfig):
    """The workers' process group, as Ray Train sets it up.

    When Ray Train takes a group apart it expects workers that have crashed, and not any that were ended
    because their node ran out of memory: those would end the whole run, and its resources would stay
    taken.
    """

    @property
    def backend_cls(self) -> Any:
        return _GroupBackend


def set_up_group(**arguments: Any) -> None:
    """Join the process group, in a worker; the store where ranks meet listens on 127.0.0.1 alone where the
    cluster does (torch's own listens on all addresses, and asks for no token)."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if arguments["world_rank"] == 0 and is_loopback(host) and port.isdigit():
        serve_store(host, int(port), arguments["world_size"])
    module: Any = torch_config
    module._setup_torch_process_group(**arguments)


def is_mistake(failed: Failed) -> bool:
    """Whether the error is one of job, task or data, which another try would repeat."""
    from hfdist import errors

    kind = getattr(errors, failed.error_class, None)
    return failed.is_user_error and getattr(kind, "exit_code", 1) == 2


def work(loop_config: dict[str, Any]) -> dict[str, Any]:
    """One worker, in the process group that Ray Train has set up.

    Returns:
        The content of result.json.
    """
    import ray

    job: Assignment = loop_config["assignment"]
    rank = get_context().get_world_rank()
    try:
        with _surroundings(job, rank):
            return _work(job, rank)
    except BaseException as error:
        failed = Failed.by(error)
        if not isinstance(error, SupersededError):  # no failure of the present group
            ray.get(job.relay.fail.remote(rank, failed))  # before the controller hears of it
        # Text only: not every exception can be sent to the driver.
        raise RuntimeError(f"rank {rank}: {failed.error_class}: {failed.message}") from None


def _work(job: Assignment, rank: int) -> dict[str, Any]:
    import torch

    from hfdist.launch.ray.metrics import RayMetricsTracker
    from hfdist.training.display import QuietDisplay
    from hfdist.training.worker import Job, run

    torch.set_num_threads(job.threads)
    comm = _join(job)
    logger.info(
        "rank %d of %d on %s: process %d, device %s, %d threads",
        *(rank, comm.world_size, platform.node(), os.getpid(), comm.device, job.threads),
    )
    display: Display = QuietDisplay()
    resume = job.resume
    import ray

    node = f"{platform.node()} ({ray.util.get_node_ip_address()}, process {os.getpid()})"
    job.relay.at.remote(rank, node)
    if rank == 0:
        placement_group = ray.util.get_current_placement_group()
        groups = ray.get(job.relay.begin.remote(placement_group, comm.world_size))
        display = RelayDisplay(job.relay)
        # A group after the first resumes from the checkpoints of the one before, if there are any.
        checkpoints = open_storage(f"{home_of(job.config.output, job.run_dir)}/{files.CHECKPOINTS}")
        resume = resume or (groups > 1 and bool(checkpoints.folders()))
    return run(
        Job(
            config=job.config,
            run_dir=job.run_dir,
            resume=comm.broadcast_object(resume),
            extra_tracker=RayMetricsTracker() if rank == 0 else None,
            retried=True,
            is_leaving=_Notice(job.config.launch),
        ),
        comm,
        display,
    )


class _Notice:
    """Asked after every step whether a node of the group drains: spot instances and upgrades give such a
    notice. The first time, a spare process is asked for: before, it would have slowed that step down."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._lacks_spare = launch.spares and (
            launch.max_failures > 0 or not isinstance(launch.workers, int)
        )

    def __call__(self) -> bool:
        if self._lacks_spare:
            self._lacks_spare = False
            keep_one()
        return get_preemption_info() is not None


def _join(job: Assignment) -> Communicator:
    """The communicator of the workers; the default group is Ray Train's."""
    from hfdist.comm import SerialCommunicator, TorchCommunicator
    from hfdist.comm.environment import is_initialized

    device = _device(job)
    if get_context().get_world_size() == 1 or not is_initialized():
        return SerialCommunicator(device)
    return TorchCommunicator(
        device,
        timeout_seconds=job.config.launch.timeout_seconds,
        shares_device=0.0 < job.gpus_per_worker < 1.0,
    )


def _device(job: Assignment) -> torch.device:
    import torch
    from ray.train.torch import get_device

    from hfdist.devices import is_accelerator, use

    if not job.gpus_per_worker:
        return torch.device("cpu")
    device = get_device()
    if not is_accelerator(device):
        raise ConfigError(
            "Ray gave this worker a GPU that torch does not see: install a torch that supports it, or "
            "set device=cpu"
        )
    use(device)
    return device


@contextmanager
def _surroundings(job: Assignment, rank: int) -> Iterator[None]:
    """The driver's folder and variables, and a log file."""
    os.environ.update(job.environment)
    log = path_of(job.run_dir, rank).relative_to(job.run_dir).as_posix()
    if is_address(job.config.output):  # nodes need share no folder
        mirror.pull(job.config.output, job.run_dir, also=[log])
        (job.run_dir / files.STOP_FILE).unlink(missing_ok=True)  # it was for an earlier attempt
        threading.Thread(target=_listen, args=(job,), name="hfdist-stop", daemon=True).start()
    elif not (job.run_dir / files.JOB).is_file():
        raise StorageError(
            f"node {get_context().get_node_rank()} (rank {rank}) does not see {job.run_dir}: set `output` "
            "to a folder that all nodes share, or to an address like s3://BUCKET/PREFIX"
        )
    if job.folder.is_dir():
        os.chdir(job.folder)
    if str(job.folder) not in sys.path:  # tasks are found from the driver's folder
        sys.path.insert(0, str(job.folder))
    handler = RelayHandler(job.relay, rank)
    logging.getLogger("hfdist").addHandler(handler)
    try:
        with logging_to_file(job.run_dir, rank, to_stderr=False):
            yield
    finally:
        logging.getLogger("hfdist").removeHandler(handler)
        with contextlib.suppress(StorageError):  # an error of the run is more important
            mirror.push(job.config.output, job.run_dir, [log])


def _listen(job: Assignment) -> None:
    """Copy the driver's request to stop to this node's own folder, where the worker looks for it."""
    import ray

    # An error means that the driver is gone, and so will be this worker.
    with contextlib.suppress(ray.exceptions.RayError):
        while True:
            time.sleep(1.0)
            if ray.get(job.relay.is_stopping.remote()):
                (job.run_dir / files.STOP_FILE).touch()
