"""Records of runs outside of their folder. The only user of `mlflow`, which is imported when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hfdist.tracking.tracker import CompositeTracker, NullTracker, RunInfo, Status, Tracker

if TYPE_CHECKING:
    from hfdist.config.tracking import TrackingConfig

__all__ = [
    "CompositeTracker",
    "NullTracker",
    "RunInfo",
    "Status",
    "Tracker",
    "close_failed",
    "make_tracker",
    "sync",
]


def make_tracker(config: TrackingConfig, output: Path) -> Tracker:
    """The tracker that a job's `tracking` section asks for."""
    if not config.enabled:
        return NullTracker()
    from hfdist.tracking.mlflow_tracker import MlflowTracker

    return MlflowTracker(config, output)


def close_failed(config: TrackingConfig, run_dir: Path) -> None:
    """Tell the server that a run has failed whose spool lies on a machine out of reach."""
    if config.enabled:
        from hfdist.tracking.resend import close

        close(config, run_dir)


def sync(run_dir: Path, uri: str | None = None, *, home: str = "") -> int:
    """Deliver what a run's tracking server has not received yet; returns the number of events.

    Args:
        run_dir: The run's folder.
        uri: Another server or store than the run's own: it is told everything.
        home: What messages call the run; by default its folder.

    Raises:
        UserError: There is nothing to deliver, the run goes on, or the server cannot be reached.
    """
    from hfdist.tracking.resend import deliver

    return deliver(run_dir, uri, home=home or str(run_dir))
