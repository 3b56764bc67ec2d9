"""Grids of runs through Ray Tune: as many at a time as the cluster can hold."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.errors import ConfigError, UserError, WorkerError
from hfdist.launch.ray.cluster import connected, node_resources
from hfdist.launch.ray.placement import Demand, suggest_fix, what_is_missing
from hfdist.rundir import files
from hfdist.rundir.stop import SignalCount, signals_counted

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig
    from hfdist.tracking import Tracker

_PARENT_SECONDS = 20.0
"""Seconds that the parent run has to get its identifier; without it the runs are not nested."""
_FOR_TRIALS = ("MLFLOW_", "HFDIST_")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the grid."""

    run_id: str
    values: Mapping[str, str]
    """The point: {"optim.damping": "0.1"}."""
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        """Its run's folder."""
        return Path(self.config.output) / self.run_id


def split_grid(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Divide `key=value` from `key=value,value,...`.

    Commas inside of brackets, braces and quotes belong to a value.

    Raises:
        ConfigError: A point of the grid is empty, or a key comes twice.
    """
    fixed: list[str] = []
    grid: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        values = [value.strip() for value in _split(text)]
        if len(values) == 1:
            fixed.append(override)
            continue
        if "" in values:
            raise ConfigError(f"{override}: a value between commas is empty")
        if key in grid:
            raise ConfigError(f"{key} comes twice: write all its values in one list")
        grid[key] = values
    return fixed, grid


def points(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """All combinations, the last key's values running fastest."""
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def run(
    sweep_id: str, config: RunConfig, trials: Sequence[Trial], tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run a grid, as nested runs of one MLflow run.

    Args:
        sweep_id: Name of the sweep, and of its folder.
        config: The job without the grid: where the runs are recorded, and the cluster.
        trials: The points.
        tell: Gets a line when a run ends.

    Returns:
        result.json of each trial with its `values`; of one that failed, `status` and `error`.

    Raises:
        UserError: There is no cluster, or a trial cannot be placed on it.
    """
    from hfdist.rundir.files import write_json
    from hfdist.tracking import Status

    folder = Path(config.output) / sweep_id
    with connected(config.launch.address):
        for trial in trials:
            nodes = node_resources()
            demand = Demand(num_workers=1, per_worker=_resources(trial.config))
            if missing := what_is_missing(demand, nodes):
                raise ConfigError(
                    f"a run cannot be placed: {missing}; {suggest_fix(demand, nodes)}"
                )
        folder.mkdir(parents=True, exist_ok=True)
        tracker = _parent(sweep_id, config, trials, folder)
        rows: list[dict[str, Any]] = []
        try:
            rows = _Sweep(trials, folder, tracker.tracked_as, config, tell).run()
            write_json(folder / "sweep.json", {"sweep_id": sweep_id, "runs": rows})
            tracker.log_artifact(folder / "sweep.json")
            losses = [row["final_loss"] for row in rows if row.get("final_loss") is not None]
            if losses:
                tracker.log_metrics({"best_final_loss": min(losses)}, 0)
        finally:
            killed = any(row["status"] == "KILLED" for row in rows)
            failed = not rows or all(row["status"] == "FAILED" for row in rows)
            tracker.finish(
                Status.KILLED if killed else Status.FAILED if failed else Status.FINISHED
            )
            shutil.rmtree(folder / "ray", ignore_errors=True)
    return rows


class _Sweep:
    """Ray Tune in a thread, and what is said meanwhile."""

    def __init__(
        self,
        trials: Sequence[Trial],
        folder: Path,
        parent: str | None,
        config: RunConfig,
        tell: Callable[[str], None],
    ) -> None:
        self._trials, self._folder, self._tell = trials, folder, tell
        self._parent, self._config = parent, config
        self._signals = SignalCount()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._told: set[str] = set()

    def run(self) -> list[dict[str, Any]]:
        """The rows of the table."""
        stop = self._folder / files.STOP_FILE
        stop.unlink(missing_ok=True)
        with signals_counted() as self._signals:
            threading.Thread(target=self._tune, name="hfdist-ray-tune", daemon=True).start()
            while not self._ended.wait(0.2):
                self._tell_ends()
                if self._signals.number:
                    stop.touch()
                    for trial in self._trials:
                        if trial.run_dir.is_dir() and not (trial.run_dir / files.RESULT).exists():
                            (trial.run_dir / files.STOP_FILE).touch()
                if self._signals.number > 1:
                    raise KeyboardInterrupt
        self._tell_ends()
        if self._error is not None:
            raise WorkerError(f"Ray Tune gave up: {self._error}") from self._error
        return [_row(trial, self._folder) for trial in self._trials]

    def _tune(self) -> None:
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # it prints even where it is told not to
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        from ray import tune

        assignment = {
            "trials": list(self._trials),
            "parent": self._parent,
            "folder": str(self._folder),
            "cwd": str(Path.cwd()),
            "environment": {k: v for k, v in os.environ.items() if k.startswith(_FOR_TRIALS)},
        }
        try:
            resources = {k.lower(): v for k, v in _resources(self._trials[0].config).items()}
            tune.Tuner(
                tune.with_resources(tune.with_parameters(_trial, assignment=assignment), resources),
                param_space={"number": tune.grid_search(list(range(len(self._trials))))},
                tune_config=tune.TuneConfig(trial_name_creator=lambda t: t.trial_id),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(self._folder / "ray"),
                    verbose=0,
                    failure_config=tune.FailureConfig(
                        max_failures=max(1, self._config.launch.max_failures)
                    ),
                ),
            ).fit()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _tell_ends(self) -> None:
        for trial in self._trials:
            row = _row(trial, self._folder)
            if trial.run_id in self._told or row["status"] == "PENDING":
                continue
            self._told.add(trial.run_id)
            point = ", ".join(f"{key}={value}" for key, value in trial.values.items())
            loss = row.get("final_loss")
            end = f"loss {loss:.6g}" if loss is not None else str(row.get("error", ""))
            self._tell(
                f"{len(self._told)}/{len(self._trials)}  {point}  {row['status']}  {end}".rstrip()
            )


def _trial(space: dict[str, Any], assignment: dict[str, Any]) -> None:
    """One run, in a process of the cluster."""
    import sys

    from ray import tune

    from hfdist.launch.start import start

    os.environ.update(assignment["environment"])
    if os.path.isdir(assignment["cwd"]):
        os.chdir(assignment["cwd"])
        sys.path.insert(0, assignment["cwd"])
    trial: Trial = assignment["trials"][space["number"]]
    folder = Path(assignment["folder"])
    if (folder / files.STOP_FILE).exists():
        return
    config = trial.config
    if assignment["parent"]:
        config = config.model_copy(
            update={
                "tracking": _replaced(config.tracking, parent_run=assignment["parent"]),
            }
        )
    before = trial.run_dir.exists()  # this trial's process died: it goes on
    try:
        result = start(config, run_dir=trial.run_dir, resume=before, display="quiet")
        tune.report({"final_loss": result["final_loss"]})
    except UserError as error:  # the other points of the grid go on
        (folder / f"{trial.run_id}.error").write_text(str(error))


def _parent(sweep_id: str, config: RunConfig, trials: Sequence[Trial], folder: Path) -> Tracker:
    """The MLflow run that holds the others."""
    from hfdist.tracking import RunInfo, make_tracker

    quiet = _replaced(config.tracking, system_metrics=False, log_model=False)
    tracker = make_tracker(quiet, Path(config.output))
    grid: dict[str, list[str]] = {}
    for trial in trials:
        for key, value in trial.values.items():
            if value not in grid.setdefault(key, []):
                grid[key].append(value)
    tracker.start(
        RunInfo(
            run_id=sweep_id,
            name=config.name,
            run_dir=folder,
            params={**config.flatten(), **{key: ", ".join(v) for key, v in grid.items()}},
            tags={"hfdist.sweep": ", ".join(grid)},
        )
    )
    deadline = time.monotonic() + (_PARENT_SECONDS if config.tracking.enabled else 0.0)
    while tracker.tracked_as is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return tracker


def _row(trial: Trial, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run_id": trial.run_id,
        "values": dict(trial.values),
        "status": "PENDING",
    }
    path, error = trial.run_dir / files.RESULT, folder / f"{trial.run_id}.error"
    try:
        if path.exists():
            row |= json.loads(path.read_text())
        if error.exists():
            row |= {"status": "FAILED", "error": error.read_text()}
    except (OSError, ValueError):
        pass  # being written
    return row


def _resources(config: RunConfig) -> dict[str, float]:
    """What a run takes: all its workers are on the trial's node, unless Ray places them."""
    launch = config.launch
    if launch.backend == "ray":
        return {"CPU": 0.0}
    workers = launch.max_workers
    gpus = launch.gpus_per_worker or (0.0 if config.device in ("auto", "cpu") else 1.0)
    found = {"CPU": workers * launch.cpus_per_worker}
    return found | ({"GPU": workers * gpus} if gpus else {})


def _replaced(section: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(section, **changes)


def _split(text: str) -> list[str]:
    parts, depth, quote, start = [], 0, "", 0
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def trial_id(sweep_id: str, values: Mapping[str, str], number: int) -> str:
    """A run id that says its point: damping-0.1 after the sweep's."""
    point = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
    return f"{sweep_id}-{number:02}-" + re.sub(r"[^A-Za-z0-9._-]+", "_", point)[:60]
