"""Start a run's workers, by whatever means job and environment name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.launch.folder import run_folder
from hfdist.launch.notices import notices

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig


def start(
    config: RunConfig, *, run_dir: Path, resume: bool = False, display: str = "auto"
) -> dict[str, Any]:
    """Run a job to its end.

    In the environment of torchrun this process joins the group as one worker; otherwise the workers
    are started here: one in this process, several as processes of this machine or through Ray.

    Args:
        config: The job.
        run_dir: The run's folder. Under torchrun rank 0's is used by all.
        resume: Continue from the newest checkpoint in it, if there is one.
        display: Name of rank 0's display, see `hfdist.training.display.make_display`.

    Returns:
        The content of result.json.

    Raises:
        UserError: Bad input, or a worker that failed, with that worker's own error.
        KeyboardInterrupt: Ctrl-C before training began.
    """
    from hfdist.comm.environment import in_group_environment

    if in_group_environment():
        from hfdist.launch import torchrun

        if not torchrun.is_rank_0():
            return torchrun.run(config, run_dir=run_dir, resume=resume, display=display)
        with notices(config, run_dir) as result:
            result |= torchrun.run(config, run_dir=run_dir, resume=resume, display=display)
        return result
    with notices(config, run_dir) as result:
        result |= _start_here(config, run_dir=run_dir, resume=resume, display=display)
    return result


def _start_here(config: RunConfig, *, run_dir: Path, resume: bool, display: str) -> dict[str, Any]:
    if config.launch.backend == "ray":
        from hfdist.launch.ray import train as ray_train

        with run_folder(config, run_dir):
            return ray_train.run(config, run_dir=run_dir, resume=resume, display=display)
    from hfdist.launch import local

    with run_folder(config, run_dir):
        return local.run(config, run_dir=run_dir, resume=resume, display=display)
