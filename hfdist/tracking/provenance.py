"""What a run was made of and with: tags."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOURCE_VARIABLE = "HFDIST_SOURCE"
"""What `source` found where the job was started: elsewhere there may be neither git nor repository."""
SOURCE_FILE = ".hfdist-source.json"
"""The same, in the folder of a submitted job's code."""
_LARGEST = 1_000_000  # bytes of a file that a run's source is made of


def provenance(task: str = "") -> dict[str, str]:
    """Versions, and the source of the user's own code.

    Args:
        task: The job's `task`; the code is where its file is, or else in the working folder.
    """
    from hfdist import __version__

    tags = {"hfdist": __version__, "python": sys.version.partition(" ")[0]}
    for package in ("torch", "mlflow"):
        with contextlib.suppress(PackageNotFoundError):
            tags[package] = version(package)
    told = _texts(os.environ.get(SOURCE_VARIABLE, ""))
    return tags | (told or source(folder_of(task)))


def folder_of(task: str) -> Path:
    """Where the code of a `task` lies: FILE.py:Class, or a module of the working folder."""
    file = Path(task.rpartition(":")[0])
    return file.parent if file.suffix == ".py" and file.is_file() else Path.cwd()


def source(folder: Path) -> dict[str, str]:
    """Tags of the code in a folder: its git commit, branch, repository and whether it differs from the
    commit; without git, a hash of the Python files in it."""
    with contextlib.suppress(OSError):
        if told := _texts((folder / SOURCE_FILE).read_text()):
            return told
    try:
        tags = {"mlflow.source.git.commit": _git(folder, "rev-parse", "HEAD")}
        new = _git(folder, "ls-files", "--others", "--exclude-standard", "--", "*.py").splitlines()
        changes = _git(folder, "diff", "HEAD", "--", ".").encode()
        is_dirty = bool(new) or bool(_git(folder, "status", "--porcelain", "-uno"))
        tags["mlflow.source.git.dirty"] = str(is_dirty).lower()
        if is_dirty:  # two runs of the same changes have the same hash
            tags["hfdist.source.diff_sha256"] = digest(folder, map(Path, new), changes)
        with contextlib.suppress(subprocess.SubprocessError):
            tags["mlflow.source.git.branch"] = _git(folder, "symbolic-ref", "--short", "HEAD")
        with contextlib.suppress(subprocess.SubprocessError):
            tags["mlflow.source.git.repoURL"] = _public(_git(folder, "remote", "get-url", "origin"))
        return tags
    except (OSError, subprocess.SubprocessError):
        files = sorted(path.relative_to(folder) for path in folder.glob("*.py"))
        return {"hfdist.source.sha256": digest(folder, files)} if files else {}


def digest(folder: Path, files: Iterable[Path], start: bytes = b"") -> str:
    """SHA-256 over `start`, and names and content of files."""
    sha = hashlib.sha256(start)
    for path in files:
        with contextlib.suppress(OSError):
            content = (folder / path).read_bytes()[:_LARGEST]
            sha.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()


def _texts(text: str) -> dict[str, str]:
    try:
        return {str(key): str(value) for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        return {}


def _git(folder: Path, *arguments: str) -> str:
    answer = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=5,
        check=True,
    )
    return answer.stdout.strip()


def _public(url: str) -> str:
    """A repository's address without user and password."""
    from hfdist.tracking.client import public

    return public(url)
