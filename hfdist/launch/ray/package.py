"""The user's own folder as a job carries it to a cluster."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfdist.errors import ConfigError

_NEVER = (".git", ".hg", ".svn", ".venv", "venv", "__pycache__", ".mypy_cache", ".ruff_cache")
# Ray would apply these files again, to what was chosen here.
_NEVER_FILES = (".gitignore", ".rayignore", "*.pyc", ".DS_Store", "mlflow.db", "mlflow.db-*")


def files_of(folder: Path, without: Sequence[Path] = ()) -> list[Path]:
    """The files that a job needs: all but those that .gitignore ignores, and caches.

    Args:
        folder: The user's folder.
        without: Folders to leave out, such as that of the runs.

    Returns:
        Paths relative to the folder, sorted.
    """
    found = _by_git(folder)
    if found is None:
        found = [
            Path(root, name).relative_to(folder)
            for root, folders, names in os.walk(folder)
            if not folders.__setitem__(slice(None), [f for f in folders if f not in _NEVER])
            for name in names
        ]
    left_out = [path.resolve() for path in without]
    return sorted(
        path
        for path in set(found)
        if not any(part in _NEVER for part in path.parts)
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NEVER_FILES)
        and (folder / path).is_file()
        and not any((folder / path).resolve().is_relative_to(each) for each in left_out)
    )


def _by_git(folder: Path) -> list[Path] | None:
    """What git would not ignore, whether the folder is in a repository or not; None without git."""
    command = ["git", "-C", str(folder)]
    inside = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run([*command, *inside], capture_output=True, timeout=60)
        if listed.returncode:
            with tempfile.TemporaryDirectory(prefix="hfdist-git-") as empty:
                subprocess.run(["git", "init", "-q", "--bare", empty], check=True, timeout=60)
                here = [f"--git-dir={empty}", f"--work-tree={folder}"]
                listed = subprocess.run(
                    [*command, *here, "ls-files", "--others", "--exclude-standard", "-z"],
                    capture_output=True,
                    timeout=60,
                    check=True,
                )
    except (OSError, subprocess.SubprocessError):
        return None
    return [Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name]


def copy_files(folder: Path, files: Sequence[Path], into: Path, limit: int) -> int:
    """Copy a job's files; returns their bytes.

    Args:
        folder, files: As of `files_of`.
        into: An empty folder.
        limit: Bytes that a job may carry.

    Raises:
        ConfigError: They are more; names the largest.
    """
    sizes = {path: (folder / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        names = ", ".join(f"{path} ({_megabytes(sizes[path])})" for path in largest)
        raise ConfigError(
            f"{folder} holds {_megabytes(total)} in {len(files)} files, more than the "
            f"{_megabytes(limit)} that a job may carry; the largest: {names}. Put data on a path that all "
            "nodes share, name it in .gitignore, or raise --max-size"
        )
    for path in files:
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / path, target)
    return total


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
