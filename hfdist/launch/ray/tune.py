"""Sweeps of runs through Ray Tune: as many at a time as the cluster can hold."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.errors import ConfigError, WorkerError
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
_ENDED = ("FINISHED", "FAILED")
_PLAN_FILE = "plan.json"
MAX_RUNS = 10_000
"""Of a sweep."""
_RANDOM = re.compile(r"(uniform|loguniform|randint)\(([^,()]+),([^,()]+)\)")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the sweep."""

    run_id: str
    values: Mapping[str, str]
    """The point: {"optim.damping": "0.1"}."""
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        """Its run's folder."""
        return Path(self.config.output) / self.run_id

    def status(self, folder: Path) -> str:
        """How its run ended: PENDING while it has not, STOPPED if it was by halving."""
        return str(_row(self, folder)["status"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep."""

    sweep_id: str
    """Its name, and that of its folder."""
    config: RunConfig
    """The job without what is varied: where the runs are recorded, and the cluster."""
    trials: Sequence[Trial]
    halving: int | None = None
    """Steps after which runs are compared first, then after `eta` times as many, and so on (ASHA, Li et
    al., A system for massively parallel hyperparameter tuning, 2020); None: all run to their end."""
    eta: int = 3
    """Of the runs that are compared one in so many goes on."""
    metric: str | None = None
    """Of metrics.jsonl, the lower the better; by default the held-out loss, or else the loss."""

    @property
    def folder(self) -> Path:
        """Of the sweep, beside its runs."""
        return Path(self.config.output) / self.sweep_id


def split_grid(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Divide `key=value` from `key=value,value,...`.

    Commas inside of brackets, braces and quotes belong to a value.

    Raises:
        ConfigError: A point of the grid is empty, a key comes twice, or must be the same in all runs.
    """
    fixed: list[str] = []
    grid: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        values = [value.strip() for value in _split(text)]
        if len(values) == 1 and not is_random(text):
            fixed.append(override)
            continue
        if "" in values:
            raise ConfigError(f"{override}: a value between commas is empty")
        if key in grid:
            raise ConfigError(f"{key} comes twice: write all its values in one list")
        if key == "output" or key.startswith("tracking."):
            raise ConfigError(f"{key} cannot be varied: the runs of a sweep lie in one place")
        grid[key] = values
    for override in fixed:
        if (key := override.partition("=")[0]) in grid:
            raise ConfigError(f"{key} comes twice: write all its values in one list")
    return fixed, grid


def samples(space: Mapping[str, Sequence[str]], count: int, seed: int) -> list[dict[str, str]]:
    """Random points: each key's value is one of its list, or drawn by Ray Tune from its range,
    `uniform(0,1)`, `loguniform(1e-3,10)` or `randint(1,100)`.

    Raises:
        ConfigError: A range that is none, too many points, or a seed that is too large.
    """
    import numpy
    from ray import tune

    if count > MAX_RUNS:
        raise ConfigError(f"samples is {count}: at most {MAX_RUNS}")
    if seed >= 2**32:
        raise ConfigError(f"seed is {seed}: it must be below 2**32")

    domains: dict[str, Any] = {}
    for key, values in space.items():
        found = _RANDOM.fullmatch(values[0].replace(" ", "")) if len(values) == 1 else None
        if found is None:
            domains[key] = tune.choice(list(values))
            continue
        kind, low, high = found.groups()
        try:
            limits = [int(x) if kind == "randint" else float(x) for x in (low, high)]
        except ValueError as error:
            wanted = "two whole numbers" if kind == "randint" else "two numbers"
            raise ConfigError(f"{key}={values[0]}: {kind} wants {wanted}") from error
        if not all(map(math.isfinite, limits)):
            raise ConfigError(f"{key}={values[0]}: both numbers must be finite")
        if not limits[0] < limits[1] or (kind == "loguniform" and limits[0] <= 0):
            raise ConfigError(
                f"{key}={values[0]}: write the smaller number first"
                + (", both above 0" if kind == "loguniform" else "")
            )
        domains[key] = getattr(tune, kind)(*limits)
    random = numpy.random.RandomState(seed)  # what Ray Tune takes
    return [
        {key: _text(d.sample(random_state=random)) for key, d in domains.items()}
        for _ in range(count)
    ]


def is_random(text: str) -> bool:
    """Whether a value is a range to draw from."""
    return _RANDOM.fullmatch(text.replace(" ", "")) is not None


def _text(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def save(plan: Plan, job: Path, fixed: Sequence[str]) -> None:
    """Write the sweep down, so that it can be gone on with; without its secrets."""
    from hfdist.config.redaction import masked_override
    from hfdist.rundir.files import write_json

    write_json(
        plan.folder / _PLAN_FILE,
        {
            "sweep_id": plan.sweep_id,
            "job": str(job.resolve()),
            "fixed": [masked_override(override) for override in fixed],
            "runs": {trial.run_id: dict(trial.values) for trial in plan.trials},
            "halving": plan.halving,
            "eta": plan.eta,
            "metric": plan.metric,
        },
    )


def load(folder: Path, overrides: Sequence[str] = ()) -> Plan:
    """The sweep of a folder, with changes of all its runs.

    Raises:
        ConfigError: There is none, or the job has changed so that it is not valid.
    """
    from hfdist.config.job import load_config

    try:
        said = json.loads((folder / _PLAN_FILE).read_text())
        job, runs = Path(said["job"]), dict(said["runs"])
        fixed = [*said["fixed"], *overrides, f"output={folder.resolve().parent}"]
        return Plan(
            sweep_id=folder.resolve().name,
            config=load_config(job, fixed),
            trials=[
                Trial(
                    run_id=run_id,
                    values=point,
                    config=load_config(job, [*fixed, *(f"{k}={v}" for k, v in point.items())]),
                )
                for run_id, point in runs.items()
            ],
            halving=said["halving"],
            eta=said["eta"],
            metric=said["metric"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder} is no sweep to go on with: name the folder that `hfdist sweep` made, with "
            f"its {_PLAN_FILE}"
        ) from error


def points(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """All combinations, the last key's values running fastest.

    Raises:
        ConfigError: They are too many.
    """
    count = math.prod(map(len, grid.values()))
    if count > MAX_RUNS:
        raise ConfigError(
            f"the grid has {count} combinations: at most {MAX_RUNS} runs, or draw some of them with --samples"
        )
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def run(plan: Plan, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run a sweep, or go on with it, as nested runs of one MLflow run.

    Args:
        plan: The sweep.
        tell: Gets a line when a run ends.

    Returns:
        result.json of each trial with its `values`; of one that failed, `status` and `error`; of one that
        halving has stopped, `status` STOPPED.

    Raises:
        UserError: There is no cluster, or a trial cannot be placed on it.
    """
    from hfdist.rundir.files import write_json
    from hfdist.tracking import Status

    folder, config = plan.folder, plan.config
    with connected(config.launch.address):
        for trial in plan.trials:
            nodes = node_resources()
            demand = Demand(num_workers=1, per_worker=_resources(trial.config))
            if missing := what_is_missing(demand, nodes):
                raise ConfigError(
                    f"a run cannot be placed: {missing}; {suggest_fix(demand, nodes)}"
                )
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.error"):  # a sweep that goes on tries them again
            path.unlink()
        tracker = _parent(plan)
        rows: list[dict[str, Any]] = []
        try:
            rows = _Sweep(plan, tracker.tracked_as, tell).run()
            write_json(folder / "sweep.json", {"sweep_id": plan.sweep_id, "runs": rows})
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

    def __init__(self, plan: Plan, parent: str | None, tell: Callable[[str], None]) -> None:
        self._plan, self._trials, self._folder = plan, plan.trials, plan.folder
        self._parent, self._tell = parent, tell
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
        from hfdist.launch.ray.trial import tuner

        # A trial whose process is lost is told, and tried again: no traceback of Ray's own besides.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        plan = self._plan
        assignment = {
            "trials": list(plan.trials),
            "metric": plan.metric,
            "halving": plan.halving,
            "parent": self._parent,
            "folder": str(self._folder),
            "cwd": str(Path.cwd()),
            "environment": {k: v for k, v in os.environ.items() if k.startswith(_FOR_TRIALS)},
        }
        # Of a sweep that goes on; halving wants to know of those that have ended, too.
        numbers = [
            k
            for k, trial in enumerate(plan.trials)
            if plan.halving is not None or trial.status(self._folder) not in _ENDED
        ]
        try:
            if numbers:
                tuner(
                    assignment,
                    numbers,
                    _resources(plan.trials[0].config),
                    folder=self._folder / "ray",
                    max_failures=max(1, plan.config.launch.max_failures),
                    max_steps=max(trial.config.steps for trial in plan.trials),
                    halving=plan.halving,
                    eta=plan.eta,
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


def _parent(plan: Plan) -> Tracker:
    """The MLflow run that holds the others."""
    from hfdist.tracking import RunInfo, make_tracker

    config = plan.config
    quiet = _replaced(config.tracking, system_metrics=False, log_model=False)
    tracker = make_tracker(quiet, Path(config.output))
    grid: dict[str, list[str]] = {}
    for trial in plan.trials:
        for key, value in trial.values.items():
            if value not in grid.setdefault(key, []):
                grid[key].append(value)
    tracker.start(
        RunInfo(
            run_id=plan.sweep_id,
            name=config.name,
            run_dir=plan.folder,
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
        elif row["status"] == "KILLED" and (folder / f"{trial.run_id}.stopped").exists():
            row["status"] = "STOPPED"
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
