"""Where a run lies: in a folder, or at an address (s3://, gs://) with a scratch folder here."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from hfdist.errors import ConfigError

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_RUN_ID = 200  # characters: names of folders and jobs end at 255


def is_run_id(name: str) -> bool:
    """Whether a run may have this name: it is a folder's, a job's and a part of addresses."""
    return len(name) <= _LONGEST_RUN_ID and _RUN_ID.fullmatch(name) is not None


def check_run_id(name: str) -> None:
    """Refuse a name before anything is made or sent under it.

    Raises:
        ConfigError: It is no run's name.
    """
    if not is_run_id(name):
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise ConfigError(
            f"run id {shown!r}: use letters, digits, dots, dashes and underscores, a letter or digit first, "
            f"at most {_LONGEST_RUN_ID} characters"
        )


def normal(output: str) -> str:
    """An `output` in the form that the others here expect: file:///FOLDER is that folder, and an address
    has no slash at its end.

    Raises:
        ValueError: An address that names nothing.
        RuntimeError: A user's folder, ~NAME, of a user that there is not.
    """
    scheme, mark, place = output.partition("://")
    if not mark:
        Path(output).expanduser()  # ~NOBODY/runs
        return output
    if not place.strip("/"):
        raise ValueError(f"{output}: name a bucket, like {scheme}://BUCKET/PREFIX")
    if scheme != "file":
        return output.rstrip("/")
    if not place.startswith("/"):
        raise ValueError(f"{output}: write file:///FOLDER, or the folder's path")
    return place


def is_address(output: str | Path) -> bool:
    """Whether `output` names an object store, and no folder."""
    return "://" in str(output)


def scratch(output: str) -> Path:
    """The folder of this machine where runs of an address are worked on: in HFDIST_SCRATCH, or in the
    folder of temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    home = os.environ.get("HFDIST_SCRATCH") or Path(tempfile.gettempdir()) / f"hfdist-{user}"
    readable = re.sub(r"[^A-Za-z0-9]+", "-", output).strip("-")[:60]
    return Path(home) / f"{readable}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


def folder_of_runs(output: str) -> Path:
    """Where run folders lie on this machine."""
    return scratch(output) if is_address(output) else Path(output).expanduser().resolve()


def home_of(output: str, run_dir: Path) -> str:
    """Where a run's results are found in the end."""
    return f"{output}/{run_dir.name}" if is_address(output) else str(run_dir)


def split(home: str) -> tuple[str, Path]:
    """(output, run folder on this machine) of ADDRESS/RUN_ID.

    Raises:
        ConfigError: It names no run.
    """
    output, _, run_id = home.rstrip("/").rpartition("/")
    if output.endswith("/") or not is_address(output):
        raise ConfigError(f"{home} is no run: write ADDRESS/RUN_ID, like s3://BUCKET/PREFIX/RUN_ID")
    return output, scratch(output) / run_id
