"""Evaluating a run, or going on with it, runs the code that its job names: whose is it?"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig


def check_trust(home: str, overrides: list[str] | None, trusted: bool) -> None:
    """Ask before code of somebody else is run; where nobody can be asked, refuse.

    Args:
        home: The run's folder, or its address.
        overrides: Changes of its job.
        trusted: The user has said yes already.

    Raises:
        ConfigError: The run's job or its task's file belongs to another user, and is not trusted.
    """
    if trusted or not hasattr(os, "getuid"):
        return
    from hfdist.config.job import RunConfig
    from hfdist.errors import ConfigError
    from hfdist.rundir import files as names
    from hfdist.training.worker import local_folder

    run_dir, _ = local_folder(home)
    config = RunConfig.from_run(run_dir, overrides or ())
    files = [run_dir / names.JOB, *_files_of(config)]
    strange = [path for path in files if _is_strange(path)]
    if not strange:
        return
    said = (
        f"{strange[-1]} belongs to {_owner(strange[-1])}, and this command runs the code that the run names "
        f"({config.task})"
    )
    if sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{said}. Run it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise ConfigError(f"{said}: read it, then add --trust")


def _files_of(config: RunConfig) -> list[Path]:
    """The file that the task is imported from; of a package, its first one. Nothing is imported here."""
    where = config.task.rpartition(":")[0]
    if where.endswith(".py"):
        return [Path(where)]
    try:
        found = importlib.util.find_spec(where.partition(".")[0])
    except (ImportError, ValueError):
        return []
    return [Path(found.origin)] if found is not None and found.origin else []


def _is_strange(path: Path) -> bool:
    """Whether a file belongs to neither this user nor the system."""
    try:
        return path.stat().st_uid not in (os.getuid(), 0)
    except OSError:
        return False  # whoever reads it says that it is not there


def _owner(path: Path) -> str:
    import pwd

    uid = path.stat().st_uid
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
