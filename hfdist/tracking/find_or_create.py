"""One job, one MLflow run: find it, or make it."""

from __future__ import annotations

import contextlib
import getpass
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hfdist.tracking.spool import Spool

logger = logging.getLogger(__name__)

RUN_ID_TAG = "hfdist.run_id"
_KIND, _TRAINING = "mlflow.experimentKind", "custom_model_development"
"""MLflow's pages: training runs with charts, and not traces and evaluations of language models."""


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """The MLflow run that a spool is delivered to."""

    run_id: str
    experiment_id: str
    known_until: Mapping[str, int] = field(default_factory=dict)
    """Step of each metric up to which it is in the run, told from another machine."""


def open_run(client: Any, spool: Spool, target: Mapping[str, Any]) -> OpenRun:
    """Find the job's run, by its identifier or its tag, or make it; remembered in the spool.

    A run of another store, or one that was deleted, is replaced by a new one that is told everything; so is
    one that holds numbers of steps which are taken again, as far as those may differ.

    Raises:
        Whatever the client raises, if the server cannot be reached.
    """
    experiment_id = _experiment(client, target)
    known = spool.recall("run")
    elsewhere = bool(known) and known.get("uri") != target["uri"]
    candidates = [None if elsewhere else known.get("mlflow_run_id"), target.get("tracked_as")]
    run_id = next((c for c in candidates if c and _is_active(client, c)), None)
    run_id = run_id or _find(client, experiment_id, target["run_id"])
    is_behind = target.get("is_behind", False)
    if run_id is not None and known.get("mlflow_run_id") == run_id and not is_behind:
        return OpenRun(
            run_id=run_id, experiment_id=known["experiment_id"], known_until=known["known_until"]
        )
    until: dict[str, int] = {}
    before = None if elsewhere else known.get("mlflow_run_id")
    if run_id is not None and (spool.is_new or is_behind):
        # The spool of the run's last attempt is on another machine: the server knows what it has.
        until = _last_steps(client, run_id)
        if 0 < target.get("first_step", 0) <= max(until.values(), default=-1):
            # Of steps that are taken again: MLflow takes no number back.
            client.delete_run(run_id)
            before, run_id, until = run_id, None, {}
    if run_id is None:
        run_id = _create(client, experiment_id, spool, target, before)
    if known and known.get("mlflow_run_id") != run_id:
        spool.rewind()
    facts = {"mlflow_run_id": run_id, "experiment_id": experiment_id, "known_until": until}
    spool.remember("run", {**facts, "uri": target["uri"]})
    spool.remember("target", {**target, "is_behind": False})
    return OpenRun(run_id=run_id, experiment_id=experiment_id, known_until=until)


def remove_twins(client: Any, run: OpenRun, run_id: str) -> None:
    """Delete empty runs of the same job: a request to make one whose answer was lost, and which a server
    that hung took up later."""
    found = runs_of(client, run.experiment_id, run_id)
    if any(twin.info.run_id == run.run_id for twin in found):
        for twin in found:
            if twin.info.run_id != run.run_id and not twin.data.metrics:
                client.delete_run(twin.info.run_id)


def _experiment(client: Any, target: Mapping[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    name = target["experiment"]
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(
                name, artifact_location=target["artifact_root"], tags={_KIND: _TRAINING}
            )
        except MlflowException:  # another run was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise RuntimeError(
            f"experiment {name!r} is deleted in MLflow: restore it, or name another in "
            "tracking.experiment"
        )
    if _KIND not in experiment.tags:
        with contextlib.suppress(MlflowException):  # a user who may write runs, and no more
            client.set_experiment_tag(experiment.experiment_id, _KIND, _TRAINING)
    return experiment.experiment_id


def _is_active(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def runs_of(client: Any, experiment_id: str, run_id: str) -> list[Any]:
    """The MLflow runs of a job, the oldest first."""
    return client.search_runs(
        [experiment_id], f"tags.`{RUN_ID_TAG}` = '{run_id}'", order_by=["attributes.start_time ASC"]
    )


def _find(client: Any, experiment_id: str, run_id: str) -> str | None:
    found = runs_of(client, experiment_id, run_id)
    return found[0].info.run_id if found else None


def _create(
    client: Any, experiment_id: str, spool: Spool, target: Mapping[str, Any], before: str | None
) -> str:
    """A new run; with the tags that people gave the one `before`, which it replaces."""
    tags = _tags(client, before) | {
        RUN_ID_TAG: target["run_id"],
        "mlflow.source.name": "hfdist",
        "mlflow.source.type": "LOCAL",
    }
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if target.get("parent_run"):
        tags["mlflow.parentRunId"] = target["parent_run"]
    first = next((event["time"] for event, _ in spool.pending(1)), None)
    run = client.create_run(experiment_id, start_time=first, tags=tags, run_name=target["run_id"])
    return run.info.run_id


def _tags(client: Any, run_id: str | None) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return {}
    try:
        return dict(client.get_run(run_id).data.tags)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # it is of another store
            return {}
        raise


def has_steps_from(client: Any, run: OpenRun, step: int) -> bool:
    """Whether a run holds numbers of this step or a later one."""
    return max(_last_steps(client, run.run_id).values(), default=-1) >= step


def _last_steps(client: Any, run_id: str) -> dict[str, int]:
    names = [n for n in client.get_run(run_id).data.metrics if not n.startswith("system/")]
    return {
        name: max(metric.step for metric in client.get_metric_history(run_id, name))
        for name in names
    }
