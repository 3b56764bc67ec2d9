"""Trackers: the only home of `mlflow`."""

from hfdist.tracking.tracker import CompositeTracker, NullTracker, RunInfo, Status, Tracker

__all__ = ["CompositeTracker", "NullTracker", "RunInfo", "Status", "Tracker"]
