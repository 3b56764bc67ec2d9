"""Runs from Python: what the command line calls, too."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfdist.config import RunConfig, load_config
from hfdist.errors import ConfigError, StorageError
from hfdist.launch import start
from hfdist.launch.torchrun import is_restart, run_id_of_group

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
    config = job if isinstance(job, RunConfig) else load_config(job, overrides)
    run_id = run_id or run_id_of_group(slug(config.name)) or new_run_id(config.name)
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigError(f"run id {run_id!r}: use letters, digits, dots, dashes and underscores")
    run_dir = Path(config.output).expanduser().resolve() / run_id
    if (run_dir / "config.yaml").exists() and not is_restart():
        raise ConfigError(f"run {run_id} exists already: `hfdist resume {run_dir}` goes on with it")
    check_writable(run_dir.parent)
    return start(config, run_dir=run_dir, resume=False, display=display)


def resume(
    run_dir: Path | str, overrides: Sequence[str] = (), *, display: str = "quiet"
) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint.

    Args:
        run_dir: The run's folder.
        overrides: Changes of its job, such as more `steps`; they are saved with the run.
        display: As in `train`.

    Returns:
        As `train`.

    Raises:
        UserError: As `train`.
    """
    run_dir = Path(run_dir).resolve()
    config = RunConfig.from_run(run_dir, overrides)
    if overrides:
        config.save(run_dir / "config.yaml")
    return start(config, run_dir=run_dir, resume=True, display=display)


def new_run_id(name: str) -> str:
    """A run id that is readable, unique, and sorts by time: digits-20260101-120000-a1b2."""
    return f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def slug(name: str) -> str:
    """A name as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


def check_writable(folder: Path) -> None:
    """Make a folder if there is none.

    Raises:
        StorageError: It cannot be made or written.
    """
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"output {folder} cannot be written: {error.strerror}. Choose another folder: output=..."
        ) from error
