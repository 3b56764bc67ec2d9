"""One worker of a group that torchrun (or any launcher that sets RANK and its kin) has started."""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.errors import ConfigError, UserError
from hfdist.launch.child import die_with_parent
from hfdist.launch.logs import logging_to_file
from hfdist.launch.start import run_folder
from hfdist.record import write_json

if TYPE_CHECKING:
    from hfdist.config import RunConfig

_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def run(config: RunConfig, *, run_dir: Path, resume: bool, display: str) -> dict[str, Any]:
    """Join the group and work; see `hfdist.launch.start`. Run folder and resume are the lead's.

    After a restart by torchrun (`--max-restarts`, or a node that joined or left) the lead goes on
    with the run that it had begun.
    """
    from hfdist.comm.environment import join_environment, record_failure

    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun leaves workers behind that are stopped when it ends.
        die_with_parent(os.getppid())
    try:
        _check_environment()
        join_environment(config.launch.timeout_seconds)
        return _work(config, run_dir, resume, display)
    except BaseException as error:
        # torchrun's summary then names the first failure by its own error.
        with suppress(Exception):
            record_failure(error)
        raise


def _work(config: RunConfig, run_dir: Path, resume: bool, display: str) -> dict[str, Any]:
    import torch

    from hfdist.comm.environment import GroupCommunicator
    from hfdist.devices import resolve
    from hfdist.display import make_display
    from hfdist.worker import Job
    from hfdist.worker import run as run_worker

    device = resolve(
        config.device,
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.launch.threads_per_worker is not None:
        torch.set_num_threads(config.launch.threads_per_worker)
    comm = GroupCommunicator(device, config.launch.timeout_seconds)
    with ExitStack() as stack:
        stack.callback(comm.close)
        story = Story.of_environment(Path(config.output)) if comm.is_lead else None
        refused: UserError | None = None
        if story is not None:
            # A mistake found here must reach the peers, who wait for the lead's answer.
            try:
                if (before := story.read()) is not None:
                    run_dir, resume = before, True
                stack.enter_context(run_folder(config, run_dir))
                story.write(run_dir)
            except UserError as error:
                refused = error
        refused, run_dir, resume = comm.from_lead((refused, run_dir.resolve(), resume))
        if refused is not None:
            raise refused
        # On another machine without a shared folder there is nowhere to log to but the console.
        if run_dir.is_dir():
            stack.enter_context(logging_to_file(run_dir, comm.rank))
        job = Job(config=config, run_dir=run_dir, resume=resume)
        result = run_worker(job, comm, make_display(display if comm.is_lead else "quiet"))
        if story is not None:
            story.end()
        return result


class Story:
    """Remembers which run a torchrun job works on, so that its restarts do not begin another.

    torchrun starts workers anew with the same command line, and tells them no more than its run id.
    The note lies in the output folder, which the lead can always reach.
    """

    def __init__(self, note: Path | None) -> None:
        self._note = note

    @classmethod
    def of_environment(cls, output: Path) -> Story:
        """The story of the job that this process belongs to; without an elastic agent, of none."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id is None:
            return cls(None)
        if run_id == "none":  # torchrun's default for static groups: many jobs have it
            run_id = f"{socket.gethostname()}-{os.getppid()}-{_started(os.getppid())}"
        return cls(output / f".torchrun-{re.sub(r'[^A-Za-z0-9_.-]', '_', run_id)}.json")

    def read(self) -> Path | None:
        """The folder of the run that this job has begun and not ended."""
        if self._note is None:
            return None
        try:
            run_dir = Path(json.loads(self._note.read_text())["run_dir"])
        except (OSError, ValueError, KeyError):
            return None
        return run_dir if run_dir.is_dir() else None

    def write(self, run_dir: Path) -> None:
        """Note the run."""
        if self._note is not None:
            write_json(self._note, {"run_dir": str(run_dir.resolve())})

    def end(self) -> None:
        """The run has ended as it should: the next one is new."""
        if self._note is not None:
            self._note.unlink(missing_ok=True)


def _started(pid: int) -> int:
    import psutil

    return int(psutil.Process(pid).create_time())


def _check_environment() -> None:
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts > 0 and os.environ.get(_SHARED_STORE) != "1":
        # The restarted workers would find the addresses of the dead in the agent's store.
        raise ConfigError(
            f"torchrun --max-restarts={restarts} needs {_SHARED_STORE}=1 in its environment: "
            "without it restarted workers cannot meet"
        )
