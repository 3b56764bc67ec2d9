"""Runs from Python: what the command line calls, too."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hfdist.checkpoint import mirror
from hfdist.config.job import RunConfig, load_config
from hfdist.errors import ConfigError, StorageError, UserError
from hfdist.launch.start import start
from hfdist.launch.torchrun import is_rank_0, is_restart, run_id_of_group
from hfdist.rundir import files
from hfdist.rundir.files import write_atomically
from hfdist.rundir.locations import check_run_id, folder_of_runs, home_of, is_address
from hfdist.training.display import DISPLAYS
from hfdist.training.worker import local_folder


def train(
    job: RunConfig | Path | str,
    overrides: Sequence[str] = (),
    *,
    display: str = "quiet",
    run_id: str | None = None,
) -> dict[str, Any]:
    """Train a job to its end.

    Args:
        job: A job, or the path of a job file.
        overrides: `key=value` each, for a job file.
        display: "auto", "rich", "plain", "json" or "quiet".
        run_id: Name of the run's folder under the job's `output`; by default made up.

    Returns:
        The content of result.json: run_id, status, steps, final_loss, parameters_sha256, ...

    Raises:
        UserError: Bad input, or a worker that failed; one message that names what is wrong.
    """
    _check_display(display)
    if isinstance(job, RunConfig) and overrides:
        raise ConfigError("overrides belong to a job file: change the RunConfig itself")
    config = job if isinstance(job, RunConfig) else load_config(job, overrides)
    if run_id is None:
        run_id = run_id_of_group(slug(config.name)) or new_run_id(config.name)
    check_run_id(run_id)
    run_dir = folder_of_runs(config.output) / run_id
    if not is_restart() and mirror.exists(config.output, run_dir):
        home = home_of(config.output, run_dir)
        raise ConfigError(f"run {run_id} exists already: `hfdist resume {home}` goes on with it")
    mirror.check_writable(config.output)
    if is_address(config.output) and is_rank_0() and not is_restart():
        _clear(run_dir)
    with output_folder(run_dir.parent):
        job = _of(config, run_dir, config.output)
        return start(job, run_dir=run_dir, resume=False, display=display)


def resume(
    run_dir: Path | str, overrides: Sequence[str] = (), *, display: str = "quiet"
) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint.

    Args:
        run_dir: The run's folder, or ADDRESS/RUN_ID.
        overrides: Changes of its job, such as more `steps`; they are saved with the run.
        display: As in `train`.

    Returns:
        As `train`.

    Raises:
        UserError: As `train`; the run's job is then as it was before.
    """
    _check_display(display)
    run_dir, output = local_folder(run_dir)
    config = _of(RunConfig.from_run(run_dir, overrides), run_dir, output)
    path = run_dir / files.JOB
    before = path.read_text()
    if overrides:
        config.save(path)
    try:
        return start(config, run_dir=run_dir, resume=True, display=display)
    except UserError as error:
        if overrides and error.exit_code == 2:  # the changes did not fit
            write_atomically(path, before)
            mirror.push(config.output, run_dir, mirror.JOB)
        raise


def sync(home: Path | str, uri: str | None = None) -> int:
    """Deliver what the tracking server has not got of a run that is over.

    Args:
        home: The run's folder, or ADDRESS/RUN_ID.
        uri: Another server or store than the run's own; it is told everything.

    Returns:
        The number of events delivered.

    Raises:
        UserError: There is nothing to deliver, the run goes on, or the server cannot be reached.
    """
    from hfdist import tracking

    run_dir, output = local_folder(home)
    mirror.pull_undelivered(output, run_dir)
    count = tracking.sync(run_dir, uri, home=home_of(output, run_dir))
    mirror.forget_undelivered(output, run_dir)
    return count


def new_run_id(name: str) -> str:
    """A run id that is readable, unique, and sorts by time: digits-20260101-120000-a1b2."""
    return f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def slug(name: str) -> str:
    """A name as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:80] or "run"


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make the folder of the runs; take it away again if bad input leaves it empty.

    Raises:
        StorageError: It cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"output {folder} cannot be written: {error.strerror}. Choose another folder: output=..."
        ) from error
    try:
        yield
    except UserError:
        with contextlib.suppress(OSError):  # not empty: something is worth keeping
            for path in made:
                path.rmdir()
        raise


def _clear(run_dir: Path) -> None:
    """Remove what a run of this name, which is no longer at its address, left in its scratch folder."""
    for path in run_dir.glob("*"):
        if path.name in (files.CODE, files.CODE_ARCHIVE):  # a submitted job has just put them there
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _of(config: RunConfig, run_dir: Path, output: str) -> RunConfig:
    """The job with its output as a full path: a run may be resumed from anywhere, or moved."""
    path = output.rstrip("/") if is_address(output) else str(run_dir.parent)
    return config.model_copy(update={"output": path})


def _check_display(display: str) -> None:
    if display not in DISPLAYS:
        raise ConfigError(f"display is {display!r}: it must be one of {', '.join(DISPLAYS)}")
