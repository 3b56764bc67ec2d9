"""What a run was made of and with: tags."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version


def provenance() -> dict[str, str]:
    """Versions, and the commit of the user's own code in the working folder."""
    from hfdist import __version__

    tags = {"hfdist": __version__, "python": sys.version.partition(" ")[0]}
    for package in ("torch", "mlflow"):
        with contextlib.suppress(PackageNotFoundError):
            tags[package] = version(package)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        tags["mlflow.source.git.commit"] = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
        tags["mlflow.source.git.dirty"] = str(bool(changed)).lower()
    return tags


def _git(*arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, timeout=2, check=True
    )
    return answer.stdout.strip()
