"""Where runs are recorded: the `tracking.*` keys of a job file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow, by default a file beside the runs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    enabled: bool = True
    """Record the run."""
    uri: str | None = None
    """Tracking server or store; by default MLFLOW_TRACKING_URI, else a sqlite file in `output`."""
    experiment: str = "hfdist"
    """Experiment that the run belongs to."""
    system_metrics: bool = True
    """Record use of CPU, memory and GPU."""
    log_model: bool = True
    """Record the trained model, so that mlflow.pytorch.load_model gives it."""
    registered_model: str | None = None
    """Register the model under this name."""
    model_alias: str | None = None
    """Alias of the registered version, like champion."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the run."""
