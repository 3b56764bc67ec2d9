"""MLflow's client, with timeouts and retries that suit a run, and quiet."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

from hfdist.imports import without_collection
from hfdist.rundir.files import replace_file

# The spool does the waiting: a server that is away must not hold the background thread for minutes, and a
# request that may have arrived is not blindly repeated. Users' own values win.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the display says where to look
}
_FILE = "sqlite:///"
_FINAL = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "INVALID_STATE",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
    }
)


def prepare() -> None:
    """Load MLflow: slow, so it is done before the first step rather than beside it."""
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)
    with without_collection():
        import mlflow  # noqa: F401

    # A new sqlite store reports every migration: no news to a person who trains a model.
    for name in (
        "alembic",
        "mlflow.store.db.utils",
        "mlflow.pytorch",
        "mlflow.utils.requirements_utils",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(uri: str, workspace: str | None = None) -> Any:
    """An `MlflowClient` of a store. May take seconds: a new database is set up here.

    Args:
        uri: The store, without a password.
        workspace: Of a server that has them. It is this process's from here on: MLflow reads a variable.
    """
    prepare()
    if workspace and is_server(uri):
        os.environ["MLFLOW_WORKSPACE"] = workspace
    from mlflow import MlflowClient

    # The address with a password, where there is one, is the environment's alone.
    variable = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(_FILE):
        _make_database(Path(uri.removeprefix(_FILE)))
    return MlflowClient(tracking_uri=variable if public(variable) == uri else uri)


def _make_database(path: Path) -> None:
    """A new sqlite store, whole or not at all: killed half-way through MLflow's first migration, it would
    be one that neither this run nor any other can use.

    MLflow goes through all migrations of its history, which takes seconds: an empty store of this version is
    kept in the user's cache.
    """
    if path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _empty_database()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        try:
            shutil.copyfile(kept, draft)
            _date(draft)
        except (OSError, sqlite3.Error):
            draft.unlink(missing_ok=True)
            MlflowClient(tracking_uri=f"{_FILE}{draft}").search_experiments(max_results=1)
            with contextlib.suppress(OSError):  # a home that cannot be written
                replace_file(kept, draft.read_bytes())
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another run was faster
        except OSError:  # a file system without links
            os.replace(draft, path)


def _date(database: Path) -> None:
    """Make the experiment that MLflow has from the start one of here and now."""
    now, here = int(1000 * time.time()), f"{Path.cwd()}/mlruns/0"
    with contextlib.closing(sqlite3.connect(database)) as store, store:
        store.execute(
            "UPDATE experiments SET artifact_location = ?, creation_time = ?, last_update_time = ?",
            (here, now, now),
        )


def _empty_database() -> Path:
    from importlib.metadata import version

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    versions = "-".join(version(name) for name in ("mlflow", "sqlalchemy"))
    return Path(cache) / "hfdist" / f"empty-{versions}.db"


def is_final(error: Exception) -> bool:
    """Whether the server has answered, and trying again cannot help."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _FINAL
    return isinstance(error, (TypeError, ValueError, KeyError))


def public(uri: str) -> str:
    """An address without a password."""
    scheme, separator, rest = uri.partition("://")
    host = rest.partition("/")[0]
    return f"{scheme}{separator}{rest[host.rindex('@') + 1 :]}" if "@" in host else uri


def is_server(uri: str) -> bool:
    """Whether a store is reached through the network."""
    return uri.startswith(("http:", "https:", "databricks"))


def one_line(error: Exception) -> str:
    """An error in a line of a log."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
