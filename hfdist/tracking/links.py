"""Where a person can look at a run before it has begun."""

from __future__ import annotations

import base64
import json
import os
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from hfdist.config.tracking import store_uri, workspace
from hfdist.tracking.client import public

if TYPE_CHECKING:
    from hfdist.config.tracking import TrackingConfig

TRAINING = "workflowType=machine_learning"
"""Opens MLflow's pages for training runs with charts; otherwise the reader's last choice, at first those for
traces and evaluations of language models, does."""
_PATIENCE = 3.0  # seconds: a link is worth no more


def run_link(config: TrackingConfig, output: Path, run_id: str) -> str | None:
    """The page of a server on which the run will be; the server's first page if it says no more.

    Returns:
        None where there is no server: a store in a file, or no tracking.
    """
    uri = public(store_uri(config, output)).rstrip("/")
    if not config.enabled or not uri.startswith(("http:", "https:")):
        return None
    name = urllib.parse.quote(config.experiment)
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}",
        headers=_headers(workspace(config)),
    )
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            experiment = json.load(answer)["experiment"]["experiment_id"]
    except (OSError, ValueError, KeyError):  # it does not exist yet, or the server is away
        return uri
    query = urllib.parse.quote(f"tags.`hfdist.run_id` = '{run_id}'")
    page = f"{uri}/#/experiments/{experiment}/runs?searchFilter={query}"
    return in_workspace(for_training(page), workspace(config))


def for_training(page: str) -> str:
    """A page of MLflow's, shown as one of training runs."""
    return f"{page}{'&' if '?' in page else '?'}{TRAINING}"


def in_workspace(page: str, workspace: str | None) -> str:
    """A page of MLflow's, in a workspace of its server."""
    if workspace is None:
        return page
    return f"{page}{'&' if '?' in page else '?'}workspace={urllib.parse.quote(workspace, safe='')}"


def _headers(workspace: str | None) -> dict[str, str]:
    """What MLflow's own variables say of the user, and the workspace."""
    return _user() | ({"X-MLFLOW-WORKSPACE": workspace} if workspace else {})


def _user() -> dict[str, str]:
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    return {}
