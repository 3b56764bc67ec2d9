"""Runs in MLflow: every call goes to the spool, and from there in the background to the server."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfdist.config.tracking import TrackingConfig, artifact_root, store_uri, workspace
from hfdist.errors import StorageError
from hfdist.rundir import files
from hfdist.tracking.client import is_server, prepare, public
from hfdist.tracking.links import in_workspace
from hfdist.tracking.provenance import provenance
from hfdist.tracking.sender import Sender
from hfdist.tracking.spool import Spool
from hfdist.tracking.system_metrics import SystemSampler
from hfdist.tracking.tracker import RunInfo, Status

logger = logging.getLogger(__name__)

_NOT_IN_NAMES = re.compile(r"[^\w\-./ :]")
_MAX_NAME = 250
_MEASURED = re.compile(r"seconds|per_second|memory")
"""Numbers of the machine: another try of the same step has others."""
_LOCAL_PATIENCE = 60.0
"""Seconds that the end of a run waits for a database file, at least: it is slow to set up, never away."""


class MlflowTracker:
    """A `Tracker` whose calls write a line to a file and return.

    Args:
        config: The job's `tracking` section.
        output: Folder of the runs, where the default store is.
    """

    def __init__(self, config: TrackingConfig, output: Path) -> None:
        self._config, self._output = config, output
        self._uri = public(store_uri(config, output))
        self._spool: Spool | None = None
        self._sender: Sender | None = None
        self._sampler: SystemSampler | None = None
        self._told: dict[int, dict[str, float]] = {}
        """What was told, before a kill, of steps that are still to be taken again."""
        self._run_dir, self._home = Path(), ""

    @property
    def tracked_as(self) -> str | None:
        return self._run().get("mlflow_run_id")

    @property
    def url(self) -> str | None:
        run = self._run()
        if not run or not self._uri.startswith(("http:", "https:")):
            return None
        base = self._uri.rstrip("/")
        page = f"{base}/#/experiments/{run['experiment_id']}/runs/{run['mlflow_run_id']}"
        return in_workspace(page, workspace(self._config))

    def start(self, info: RunInfo) -> None:
        if self._sender is not None:
            raise RuntimeError("a tracker starts once")
        prepare()
        self._run_dir, self._home = info.run_dir, info.home or str(info.run_dir)
        # A predecessor that is dying lets go of the spool; one that hangs must not hold the run up.
        self._spool = spool = Spool(info.run_dir / files.SPOOL, wait=5.0, take_over=True)
        self._compare(info)
        missed = [line for line in info.record if line["step"] > spool.last_step]
        spool.remember("target", self._target(info) | {"is_behind": bool(missed)})
        tags = {**provenance(str(info.params.get("task", ""))), **info.tags, **self._config.tags}
        spool.append("status", status=str(Status.RUNNING))
        spool.append("params", values=_texts(info.params))
        spool.append("tags", values=_texts(tags))
        if info.dataset:
            spool.append("dataset", values=dict(info.dataset))
        for line in missed:  # steps of an attempt on another machine
            self._append_metrics(_numbers(line), line["step"], at=int(1000 * line["time"]))
        self._sender = Sender(spool)
        if self._config.system_metrics:
            first = int(spool.recall("system").get("next", 0))
            self._sampler = SystemSampler(
                self._log_system, self._config.system_metrics_every, first
            )

    def log_metrics(self, values: Mapping[str, float], step: int) -> Mapping[str, float]:
        if self._spool is None or self._is_over:
            return values
        told = self._told.pop(step, None)
        if told is not None:
            if _same_but_for_times(told, _named(values)):
                return {key: told[_name(key)] for key in values}
            self._tell_again(step)
        if step > self._spool.last_step:
            self._append_metrics(values, step)
        return values

    def log_artifact(self, path: Path, folder: str = "") -> None:
        if self._is_open:
            self._append("artifact", path=self._relative(path), folder=folder)

    def log_plot(self, path: Path, step: int) -> None:
        if self._is_open:
            self.log_artifact(path, "plots")
            self._append("plot", path=self._relative(path), step=step)

    def describe(self, text: str) -> None:
        if self._is_open:
            self._append("description", text=text)

    def log_model(self, model: Any, example_inputs: Any, step: int) -> None:
        if not self._is_open:
            return
        from hfdist.tracking.models import save_model

        folder = self._run_dir / files.MODEL
        try:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
            save_model(model, example_inputs, folder)
        except Exception as error:  # a model that cannot be saved is no reason to fail the run
            logger.warning("the model is not recorded: %s: %s", type(error).__name__, error)
            return
        self._append("model", path=folder.name, step=step)

    def flush(self) -> bool:
        if self._sender is None or not self._is_open:
            return True
        patience = self._config.finish_timeout
        if patience > 0 and not is_server(self._uri) and not self._sender.problem:
            patience = max(patience, _LOCAL_PATIENCE)
        return self._sender.flush(patience)

    def finish(self, status: Status) -> bool:
        if self._spool is None or self._sender is None:
            return True
        if not self._is_open:
            return self._is_delivered
        if self._sampler is not None:
            self._sampler.stop()
        if self._told:  # the run ends before it has come as far as it was
            self._tell_again(min(self._told))
        self._append("status", status=str(status))
        self._is_delivered = self.flush()
        if not self._is_delivered:
            logger.warning(
                "%d events of the run have not reached %s (%s); `hfdist sync %s` delivers them",
                self._spool.num_pending,
                self._uri,
                self._sender.problem or "it is slow",
                self._home,
            )
        self._is_over = True
        self._sender.stop()
        self._spool.close()
        return self._is_delivered

    # -- inside ----------------------------------------------------------------------------------

    _is_over = _is_delivered = False

    @property
    def _is_open(self) -> bool:
        return self._spool is not None and not self._is_over

    def _relative(self, path: Path) -> str:
        path, home = Path(path).resolve(), self._run_dir.resolve()
        # The run's folder may move before it is delivered.
        return str(path.relative_to(home) if path.is_relative_to(home) else path)

    def _compare(self, info: RunInfo) -> None:
        """Find what was told of steps that are taken again, and void what is not in the run's record."""
        assert self._spool is not None
        record = {line["step"]: line for line in info.record}
        for step, told in self._spool.steps_told():
            if info.first_step is not None and step >= info.first_step:
                self._told[step] = told
            elif step in record and not _equal(told, _named(_numbers(record[step]))):
                self._tell_again(step)
                return

    def _tell_again(self, step: int) -> None:
        self._append("again", step=step)
        self._told.clear()

    def _append(self, kind: str, **values: Any) -> None:
        assert self._spool is not None
        self._spool.append(kind, **values)

    def _append_metrics(
        self, values: Mapping[str, float], step: int, *, at: int | None = None
    ) -> None:
        self._append("metrics", at=at, values=_named(values), step=step)

    def _log_system(self, values: Mapping[str, float], number: int) -> None:
        if self._spool is not None and self._is_open:
            with contextlib.suppress(StorageError):  # the run itself will say that the disk is full
                self._spool.append("system", values=dict(values), step=number)
                self._spool.remember("system", {"next": number + 1})

    def _run(self) -> dict[str, Any]:
        run = {} if self._spool is None else self._spool.recall("run")
        return run if run.get("uri") == self._uri else {}

    def _target(self, info: RunInfo) -> dict[str, Any]:
        config = self._config
        return {
            "uri": self._uri,
            "workspace": workspace(config),
            "experiment": config.experiment,
            "artifact_root": artifact_root(self._uri, self._output),
            "run_id": info.run_id,
            "name": info.name,
            "tracked_as": info.tracked_as,
            "first_step": info.first_step or 0,
            "parent_run": config.parent_run,
            "registered_model": config.registered_model,
            "model_alias": config.model_alias,
            "model_stage": config.model_stage,
        }


def _name(key: str) -> str:
    """A metric's name as MLflow takes it."""
    return _NOT_IN_NAMES.sub("_", key)[:_MAX_NAME]


def _named(values: Mapping[str, float]) -> dict[str, float]:
    return {_name(key): float(value) for key, value in values.items()}


def _equal(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether two steps have the same numbers, NaN included."""
    return a.keys() == b.keys() and all(a[k] == b[k] or a[k] != a[k] != b[k] != b[k] for k in a)


def _same_but_for_times(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    kept = [{k: v for k, v in x.items() if not _MEASURED.search(k)} for x in (a, b)]
    return a.keys() == b.keys() and _equal(*kept)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among a record's values."""
    return {
        key: value
        for key, value in line.items()
        if key not in ("step", "time") and isinstance(value, (int, float))
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {_name(str(key)): str(value) for key, value in values.items()}
