"""This user's token for Ray clusters: a file that nobody else can read."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def token_path() -> Path:
    """The file that holds this user's token for Ray clusters."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def use_token() -> None:
    """Show this user's token to clusters, if there is one and nobody has said otherwise."""
    if "RAY_AUTH_MODE" not in os.environ and token_path().is_file():
        os.environ["RAY_AUTH_MODE"] = "token"
        read_authentication_again()


def write_token(path: Path) -> Path:
    """Make a token file that only this user can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


@functools.cache
def private_token() -> Path:
    """A token for this process's private clusters; Ray reads it once a process."""
    folder = Path(tempfile.mkdtemp(prefix="hfdist-token-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_token(folder / "token")


def read_authentication_again() -> None:
    """Let Ray see that the variables have changed: it reads them when it is imported."""
    try:
        from ray import _raylet

        raylet: Any = _raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
    except (ImportError, AttributeError):
        logger.debug("this Ray cannot read its variables again")
