"""The interface of what records a run."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Status(enum.StrEnum):
    """How a run ended; MLflow's words."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known of a run at its start."""

    run_id: str
    name: str
    run_dir: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    """The resolved job, flattened: {"optim.damping": 1.0, ...}."""
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, Any] = field(default_factory=dict)
    """{"name": .., "num_examples": .., "num_eval_examples": .., "digest": ..}."""
    tracked_as: str | None = None
    """Identifier that the tracker gave this run before (`Tracker.tracked_as`), on resume."""
    record: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl of the steps before, on resume: what was recorded on a lost machine may
    not have arrived."""
    first_step: int | None = None
    """Step at which the run starts, or goes on; None: it is not known, and numbers of a step that was told
    before are taken for the same."""
    home: str = ""
    """Where a person finds the run: its folder, or ADDRESS/RUN_ID."""


class Tracker(Protocol):
    """Only rank 0 holds one that does anything. No method raises because a server is away, and
    none blocks the caller on the network."""

    @property
    def tracked_as(self) -> str | None:
        """The tracker's own identifier of the run (MLflow's run id), once known."""
        ...

    @property
    def url(self) -> str | None:
        """Where a person can look at the run."""
        ...

    def start(self, info: RunInfo) -> None:
        """Open the run, or go on with `info.tracked_as`."""
        ...

    def log_metrics(self, values: Mapping[str, float], step: int) -> Mapping[str, float]:
        """Numbers of one step, stamped with the time of the call.

        Returns:
            What the record holds of the step: `values`, or the numbers that were told before a kill where
            the step is taken again and nothing but its times and memory differs.
        """
        ...

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file of the run."""
        ...

    def log_plot(self, path: Path, step: int) -> None:
        """A picture of the run after so many steps, for its page."""
        ...

    def describe(self, text: str) -> None:
        """What the run's page says of it, in Markdown; `description.RUN` in it becomes `tracked_as`."""
        ...

    def log_model(self, model: Any, example_inputs: Any, step: int) -> None:
        """The trained torch module with its signature, so that it can be loaded to predict."""
        ...

    def flush(self) -> bool:
        """Wait a limited time until everything is delivered; whether it is. Not for use in steps."""
        ...

    def finish(self, status: Status) -> bool:
        """Deliver what is pending and close the run; whether all is delivered. Idempotent."""
        ...


class NullTracker:
    """Records nothing."""

    tracked_as: str | None = None
    url: str | None = None

    def start(self, info: RunInfo) -> None:
        pass

    def log_metrics(self, values: Mapping[str, float], step: int) -> Mapping[str, float]:
        return values

    def log_artifact(self, path: Path, folder: str = "") -> None:
        pass

    def log_plot(self, path: Path, step: int) -> None:
        pass

    def describe(self, text: str) -> None:
        pass

    def log_model(self, model: Any, example_inputs: Any, step: int) -> None:
        pass

    def flush(self) -> bool:
        return True

    def finish(self, status: Status) -> bool:
        return True


class CompositeTracker:
    """Tells several trackers the same; the first that knows an identifier or a url gives it."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    @property
    def tracked_as(self) -> str | None:
        return next((t.tracked_as for t in self._trackers if t.tracked_as), None)

    @property
    def url(self) -> str | None:
        return next((t.url for t in self._trackers if t.url), None)

    def start(self, info: RunInfo) -> None:
        for tracker in self._trackers:
            tracker.start(info)

    def log_metrics(self, values: Mapping[str, float], step: int) -> Mapping[str, float]:
        for tracker in self._trackers:
            values = tracker.log_metrics(values, step)
        return values

    def log_artifact(self, path: Path, folder: str = "") -> None:
        for tracker in self._trackers:
            tracker.log_artifact(path, folder)

    def log_plot(self, path: Path, step: int) -> None:
        for tracker in self._trackers:
            tracker.log_plot(path, step)

    def describe(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.describe(text)

    def log_model(self, model: Any, example_inputs: Any, step: int) -> None:
        for tracker in self._trackers:
            tracker.log_model(model, example_inputs, step)

    def flush(self) -> bool:
        delivered = [tracker.flush() for tracker in self._trackers]  # every one of them
        return all(delivered)

    def finish(self, status: Status) -> bool:
        delivered = [tracker.finish(status) for tracker in self._trackers]
        return all(delivered)
