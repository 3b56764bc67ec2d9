"""Where runs are recorded: the `tracking.*` keys of a job file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow, by default a file beside the runs.

    Raises:
        ValueError: A value does not fit; the message names the key.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "coerce_numbers_to_str": True,
    }

    enabled: bool = True
    """Record the run."""
    uri: str | None = None
    """Tracking server or store; by default MLFLOW_TRACKING_URI, else a sqlite file in `output`. Users and
    tokens come from MLflow's own variables (MLFLOW_TRACKING_USERNAME, ..._PASSWORD, ..._TOKEN)."""
    workspace: str | None = None
    """Workspace of a server that has them; by default MLFLOW_WORKSPACE, else the server's own default."""
    experiment: str = "hfdist"
    """Experiment that the run belongs to."""
    parent_run: str | None = None
    """MLflow run that this one is nested in."""
    system_metrics: bool = True
    """Record use of CPU, memory, disk and GPU."""
    system_metrics_every: float = 10.0
    """Seconds between samples of them."""
    log_model: bool = True
    """Record the trained model, so that mlflow.pytorch.load_model gives it."""
    registered_model: str | None = None
    """Register the model under this name."""
    model_alias: str | None = None
    """Alias of the registered version, like champion."""
    model_stage: str | None = None
    """Stage of the registered version, like Staging (MLflow prefers aliases)."""
    finish_timeout: float = 20.0
    """Seconds that the end of a run waits for the server; `hfdist sync RUN_DIR` delivers the rest."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the run."""

    def __post_init__(self) -> None:
        if self.uri is not None and "@" in self.uri.partition("://")[2].partition("/")[0]:
            # It would be written into every record of the run.
            raise ValueError(
                "uri holds a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        if (self.uri or "").startswith("file:"):
            raise ValueError(
                f"uri is {self.uri}: MLflow's file stores are gone, use sqlite:///FILE"
            )
        if self.workspace is not None and not self.workspace.strip():
            raise ValueError("workspace is empty: name one, or null")
        if not self.experiment:
            raise ValueError("experiment is empty: name one")
        if not self.system_metrics_every > 0:
            raise ValueError(
                f"system_metrics_every is {self.system_metrics_every}: it must be above 0"
            )
        if self.finish_timeout < 0:
            raise ValueError(f"finish_timeout is {self.finish_timeout}: it must be at least 0")
        for key in ("model_alias", "model_stage"):
            if getattr(self, key) is not None and self.registered_model is None:
                raise ValueError(f"{key} is set but registered_model is not: name the model, too")


def store_uri(config: TrackingConfig, output: Path) -> str:
    """Address of the tracking store: the job's, the environment's, or a sqlite file in `output`."""
    configured = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return configured or f"sqlite:///{output.expanduser().resolve() / 'mlflow.db'}"


def workspace(config: TrackingConfig) -> str | None:
    """Workspace of the server: the job's or the environment's."""
    return config.workspace or os.environ.get("MLFLOW_WORKSPACE") or None


def artifact_root(uri: str, output: Path) -> str | None:
    """Where a new experiment of a database store keeps its files; a server decides that itself."""
    if uri.startswith(("http:", "https:", "databricks")):
        return None
    return (output.expanduser().resolve() / "mlartifacts").as_uri()
