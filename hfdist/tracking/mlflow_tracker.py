"""Runs in MLflow: what is told goes to the spool, and from there in the background to the server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfdist.tracking.config import TrackingConfig, artifact_root, store_uri
from hfdist.tracking.spool import Event, Spool
from hfdist.tracking.system_metrics import SystemSampler
from hfdist.tracking.tracker import RunInfo, Status

logger = logging.getLogger(__name__)

RUN_ID_TAG = "hfdist.run_id"
_BATCH = 500
"""Events a delivery."""
_MAX_PARAM, _MAX_TAG = 6000, 8000
"""Characters that MLflow stores."""
# A server that is away must not hold the background thread for minutes; users' own values win.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


class MlflowTracker:
    """A `Tracker` whose calls write a line to a file and return.

    Args:
        config: The job's `tracking` section.
        output: Folder of the runs, home of the default store.
    """

    def __init__(self, config: TrackingConfig, output: Path) -> None:
        self._config, self._output = config, output
        self._uri = store_uri(config, output)
        self._spool: Spool | None = None
        self._courier: Courier | None = None
        self._sampler: SystemSampler | None = None
        self._first_new_step = 0

    @property
    def tracked_as(self) -> str | None:
        return None if self._spool is None else self._spool.recall("run").get("mlflow_run_id")

    @property
    def url(self) -> str | None:
        if self._spool is None or not self._uri.startswith(("http:", "https:")):
            return None
        run = self._spool.recall("run")
        if not run:
            return None
        base = self._uri.rstrip("/")
        return f"{base}/#/experiments/{run['experiment_id']}/runs/{run['mlflow_run_id']}"

    def start(self, info: RunInfo) -> None:
        for key, value in _PATIENCE.items():
            os.environ.setdefault(key, value)
        import mlflow  # noqa: F401  (slow: now, rather than beside the first steps)

        self._spool = spool = Spool(info.run_dir / "spool")
        # Steps that are repeated after a crash were told in the run's last life.
        self._first_new_step = spool.last_step + 1
        spool.remember(
            "target",
            {
                "uri": self._uri,
                "experiment": self._config.experiment,
                "artifact_root": artifact_root(self._uri, self._output),
                "run_id": info.run_id,
                "name": info.name,
                "tracked_as": info.tracked_as,
                "parent_run": self._config.parent_run,
                "registered_model": self._config.registered_model,
                "model_alias": self._config.model_alias,
                "model_stage": self._config.model_stage,
            },
        )
        tags = {**_provenance(), **info.tags, **self._config.tags}
        spool.append("status", status=str(Status.RUNNING))
        spool.append("params", values={k: str(v) for k, v in info.params.items()})
        spool.append("tags", values={k: str(v) for k, v in tags.items()})
        if info.dataset:
            spool.append("dataset", values=dict(info.dataset))
        self._courier = Courier(spool)
        if self._config.system_metrics:
            first = int(spool.recall("system").get("next", 0))
            self._sampler = SystemSampler(
                self._log_system, self._config.system_metrics_every, first
            )

    def _log_system(self, values: Mapping[str, float], number: int) -> None:
        assert self._spool is not None
        self._spool.append("system", values=dict(values), step=number)
        self._spool.remember("system", {"next": number + 1})

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        if self._spool is not None and step >= self._first_new_step:
            self._spool.append("metrics", values=dict(values), step=step)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        if self._spool is not None:
            self._spool.append("artifact", path=str(path), folder=folder)

    def log_model(self, model: Any, example_inputs: Any, step: int) -> None:
        if self._spool is None:
            return
        from hfdist.tracking.models import save_model

        with contextlib.suppress(FileNotFoundError):
            import shutil

            shutil.rmtree(self._model_folder)
        try:
            save_model(model, example_inputs, self._model_folder)
        except Exception as error:
            logger.warning("the model is not recorded: %s: %s", type(error).__name__, error)
            return
        self._spool.append("model", path=str(self._model_folder), step=step)

    @property
    def _model_folder(self) -> Path:
        assert self._courier is not None
        return self._courier.run_dir / "model"

    def finish(self, status: Status) -> None:
        spool, courier = self._spool, self._courier
        if spool is None or courier is None or courier.is_over:
            return
        if self._sampler is not None:
            self._sampler.stop()
        spool.append("status", status=str(status))
        if not courier.finish(self._config.finish_timeout):
            left = spool.total - spool.num_delivered
            logger.warning(
                "%d events of the run have not reached %s (%s); `hfdist sync %s` delivers them",
                left,
                _public(self._uri),
                courier.problem or "it is slow",
                courier.run_dir,
            )
        spool.close()


class Courier:
    """Delivers a spool to its server, in order, until told to end.

    Args:
        spool: Knows its target.
    """

    def __init__(self, spool: Spool, run_dir: Path | None = None) -> None:
        self._spool = spool
        self.run_dir = run_dir or spool.folder.parent
        self.problem = ""
        """What keeps it from delivering, if something does."""
        self.is_over = False
        self._ending = False
        self._delivery = Delivery(spool)
        self._thread = threading.Thread(target=self._run, name="hfdist-tracking", daemon=True)
        self._thread.start()

    def finish(self, timeout: float) -> bool:
        """Wait until all is delivered, at most so many seconds; returns whether it is."""
        self._ending = True
        with self._spool.arrived:
            self._spool.arrived.notify_all()
        self._thread.join(timeout)
        self.is_over = True
        return self._spool.num_delivered >= self._spool.total

    def _run(self) -> None:
        pause = 0.5
        while not self.is_over:
            pending = self._spool.pending()
            if not pending:
                if self._ending:
                    return
                with self._spool.arrived:
                    if self._spool.total <= self._spool.num_delivered and not self._ending:
                        self._spool.arrived.wait(5.0)
                time.sleep(0.05)  # what comes together is delivered together
                continue
            try:
                self._delivery.deliver(pending[:_BATCH])
                self.problem, pause = "", 0.5
            except Exception as error:
                text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                if not self.problem:
                    logger.info("tracking waits: %s", text)
                self.problem = text[:300]
                deadline = time.monotonic() + pause
                while time.monotonic() < deadline and not self.is_over:
                    time.sleep(0.1)
                pause = min(2 * pause, 10.0)


class Delivery:
    """Events -> MLflow's client. Delivering an event twice leaves what delivering it once does."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._target = spool.recall("target")
        self._client: Any = None

    def deliver(self, events: Sequence[Event]) -> None:
        """Deliver in order, acknowledging as it goes. Raises whatever the client raises, if the server
        cannot be reached; an event that the server refuses for good is skipped with a warning."""
        run_id = self._run_id()
        start = 0
        while start < len(events):
            stop = start + 1
            if _is_metrics(events[start]):  # as many as come in a row in one call
                while stop < len(events) and _is_metrics(events[stop]):
                    stop += 1
            group = events[start:stop]
            try:
                self._send(run_id, group)
            except Exception as error:
                if not _is_final(error):
                    raise
                logger.warning("MLflow refuses %s: %s", group[0]["kind"], error)
            self._spool.acknowledge(len(group))
            start = stop

    def _run_id(self) -> str:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if self._client is None:
            with _quiet_migrations():
                self._client = MlflowClient(tracking_uri=self._target["uri"])
        known = self._spool.recall("run").get("mlflow_run_id")
        if known:
            return known
        client, target = self._client, self._target
        name = target["experiment"]
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                id_ = client.create_experiment(name, artifact_location=target["artifact_root"])
            except MlflowException:  # another run was faster
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
                id_ = experiment.experiment_id
        else:
            id_ = experiment.experiment_id
        mlflow_run_id = target.get("tracked_as") or self._find(id_) or self._create(id_)
        self._spool.remember("run", {"mlflow_run_id": mlflow_run_id, "experiment_id": id_})
        return mlflow_run_id

    def _find(self, experiment_id: str) -> str | None:
        """The run, if it was made and the answer was lost."""
        found = self._client.search_runs(
            [experiment_id], f"tags.`{RUN_ID_TAG}` = '{self._target['run_id']}'", max_results=1
        )
        return found[0].info.run_id if found else None

    def _create(self, experiment_id: str) -> str:
        tags = {RUN_ID_TAG: self._target["run_id"]}
        if self._target.get("parent_run"):
            tags["mlflow.parentRunId"] = self._target["parent_run"]
        first = next(iter(self._spool.pending()), {"time": int(time.time() * 1000)})
        run = self._client.create_run(
            experiment_id, start_time=first["time"], tags=tags, run_name=self._target["run_id"]
        )
        return run.info.run_id

    def _send(self, run_id: str, group: Sequence[Event]) -> None:
        event = group[0]
        match event["kind"]:
            case "metrics" | "system":
                self._send_metrics(run_id, group)
            case "params":
                self._send_params(run_id, event["values"])
            case "tags":
                from mlflow.entities import RunTag

                tags = [RunTag(k, v[:_MAX_TAG]) for k, v in event["values"].items()]
                for k in range(0, len(tags), 100):
                    self._client.log_batch(run_id, tags=tags[k : k + 100])
            case "dataset":
                self._send_dataset(run_id, event["values"])
            case "artifact":
                if Path(event["path"]).exists():
                    self._client.log_artifact(run_id, event["path"], event["folder"] or None)
            case "model":
                from hfdist.tracking.models import send_model

                send_model(self._client, run_id, self._spool, event, self._target)
            case "status":
                ended = event["time"] if event["status"] != Status.RUNNING else None
                if ended is None:
                    self._client.update_run(run_id, status=event["status"])
                else:
                    self._client.set_terminated(run_id, event["status"], end_time=ended)

    def _send_metrics(self, run_id: str, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), event["time"], event["step"])
            for event in events
            for key, value in event["values"].items()
        ]
        for k in range(0, len(metrics), 1000):
            self._client.log_batch(run_id, metrics=metrics[k : k + 1000])

    def _send_params(self, run_id: str, values: Mapping[str, str]) -> None:
        """MLflow lets nobody change a parameter: what a resumed run changed becomes a tag."""
        from mlflow.entities import Param, RunTag

        there = self._client.get_run(run_id).data.params
        clipped = {k: v[:_MAX_PARAM] for k, v in values.items()}
        new = [Param(k, v) for k, v in clipped.items() if k not in there]
        for k in range(0, len(new), 100):
            self._client.log_batch(run_id, params=new[k : k + 100])
        changed = {k: v for k, v in clipped.items() if k in there and there[k] != v}
        if changed:
            tags = [RunTag(f"changed.{k}", v) for k, v in changed.items()]
            self._client.log_batch(run_id, tags=tags[:100])

    def _send_dataset(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = {k: v for k, v in values.items() if k not in ("name", "digest")}
        dataset = Dataset(
            name=str(values.get("name", "data")),
            digest=str(values.get("digest") or _digest(values))[:36],
            source_type="code",
            source=json.dumps({"task": values.get("name")}),
            profile=json.dumps(profile),
        )
        training = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, [DatasetInput(dataset, [training])])


def deliver(run_dir: Path) -> int:
    """Deliver what a finished run's server has not got; returns the number of events.

    Raises:
        ConfigError: The folder has no spool.
        StorageError: The server still cannot be reached.
    """
    from hfdist.errors import ConfigError, StorageError

    folder = run_dir / "spool"
    if not (folder / "target.json").is_file():
        raise ConfigError(
            f"{run_dir} has nothing to deliver: it is no run's folder, or not tracked"
        )
    for key, value in _PATIENCE.items():
        os.environ.setdefault(key, value)
    spool = Spool(folder)
    delivery, count = Delivery(spool), 0
    try:
        while pending := spool.pending()[:_BATCH]:
            delivery.deliver(pending)
            count += len(pending)
    except Exception as error:
        uri = _public(spool.recall("target")["uri"])
        raise StorageError(
            f"{uri} cannot be reached: {str(error).splitlines()[0]}. {count} events were delivered, "
            f"{spool.total - spool.num_delivered} are kept: try again later"
        ) from error
    finally:
        spool.close()
    return count


# -- helpers -----------------------------------------------------------------------------------------


def _is_metrics(event: Event) -> bool:
    return event["kind"] in ("metrics", "system")


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")
    return isinstance(error, (TypeError, ValueError, KeyError))


def _digest(values: Mapping[str, Any]) -> str:
    """The same for the same data in every life of a run, so that it is recorded once."""
    return hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()[:16]


def _provenance() -> dict[str, str]:
    import torch

    from hfdist import __version__

    tags = {
        "hfdist": __version__,
        "torch": str(torch.__version__),
        "python": sys.version.partition(" ")[0],
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # The user's own code is what a run is made of.
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    return tags


def _public(uri: str) -> str:
    """An address without a password."""
    scheme, separator, rest = uri.partition("://")
    host = rest.partition("/")[0]
    return f"{scheme}{separator}{rest[host.rindex('@') + 1 :]}" if "@" in host else uri


@contextlib.contextmanager
def _quiet_migrations() -> Any:
    """A new sqlite store reports every migration: no news to a person who trains a model."""
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    yield
