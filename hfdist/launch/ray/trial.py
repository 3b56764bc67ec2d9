"""A run of a sweep, as Ray Tune sees it: one step after the other, until it ends or is stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from hfdist.errors import UserError
from hfdist.launch.start import start
from hfdist.rundir import files
from hfdist.rundir.files import StepLog

_POLL = 0.1  # seconds between looks at the run's record
_END_SECONDS = 300.0  # that a run which is stopped has for its last checkpoint


def loss_of(record: Mapping[str, Any], metric: str | None) -> float:
    """What runs are compared by: a metric of the record, by default the held-out loss where there is one."""
    names = [metric] if metric else ["eval/loss", "final_loss"]
    value = next((record[name] for name in names if record.get(name) is not None), math.inf)
    return float(value) if math.isfinite(value) else math.inf


class TuneTrial(tune.Trainable):
    """Trains one point of the sweep in a thread, and reports a step at a time.

    What the run's record holds from an earlier attempt is reported first: so the scheduler of a sweep that
    goes on knows what it knew.
    """

    def setup(self, config: dict[str, Any], **assignment: Any) -> None:
        self._assignment = assignment
        os.environ.update(assignment["environment"])
        if os.path.isdir(assignment["cwd"]):
            os.chdir(assignment["cwd"])
            sys.path.insert(0, assignment["cwd"])
        self._trial = assignment["trials"][config["number"]]
        self._folder = Path(assignment["folder"])
        self._reported = 0
        self._has_metric = False
        self._thread: threading.Thread | None = None
        self._last: dict[str, Any] = {"loss": math.inf, "steps": 0}

    def step(self) -> dict[str, Any]:
        """The next step's loss; `done` with the last one."""
        while True:
            # Before the record is read: what comes last must not be missed.
            is_over = self._is_over()
            records = StepLog(self._trial.run_dir / files.METRICS).read()
            if len(records) > self._reported:
                record = records[self._reported]
                self._reported += 1
                self._look_for_metric(record)
                loss = loss_of(record, self._assignment["metric"])
                self._last = {"loss": loss, "steps": record["step"] + 1}
                return self._last | {"done": False}
            if is_over:
                return self._last | {"done": True}
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hfdist-trial", daemon=True)
                self._thread.start()
            time.sleep(_POLL)

    def _look_for_metric(self, record: Mapping[str, Any]) -> None:
        """End a run that cannot be compared: where it first would be, its record has no such metric."""
        metric, halving = self._assignment["metric"], self._assignment["halving"]
        self._has_metric |= metric is None or record.get(metric) is not None
        if self._has_metric or halving is None or record["step"] + 1 < halving:
            return
        numbers = (k for k, v in record.items() if isinstance(v, int | float) and k != "time")
        (self._folder / f"{self._trial.run_id}.error").write_text(
            f"metric is {metric}: the first {halving} steps record {', '.join(sorted(numbers))}"
        )
        with contextlib.suppress(OSError):
            (self._trial.run_dir / files.STOP_FILE).touch()

    def cleanup(self) -> None:
        """Tune is done with it: a run that has not ended writes a checkpoint and stops."""
        if self._thread is None or not self._thread.is_alive():
            return
        if not self._is_sweep_stopped():
            (self._folder / f"{self._trial.run_id}.stopped").touch()
        deadline = time.monotonic() + _END_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            # Again and again: a run that begins takes away a request to the one before it.
            with contextlib.suppress(OSError):
                (self._trial.run_dir / files.STOP_FILE).touch()
            self._thread.join(1.0)

    def _run(self) -> None:
        trial, parent = self._trial, self._assignment["parent"]
        config = trial.config
        if parent:
            tracking = dataclasses.replace(config.tracking, parent_run=parent)
            config = config.model_copy(update={"tracking": tracking})
        before = trial.run_dir.exists()  # of an earlier attempt
        (trial.run_dir / files.RESULT).unlink(missing_ok=True)
        try:
            start(config, run_dir=trial.run_dir, resume=before, display="quiet")
        except UserError as error:  # the other points of the sweep go on
            (self._folder / f"{trial.run_id}.error").write_text(str(error))
        except KeyboardInterrupt:
            pass

    def _is_over(self) -> bool:
        if self._thread is not None:
            return not self._thread.is_alive()
        return self._is_sweep_stopped() or self._trial.status(self._folder) in (
            "FINISHED",
            "FAILED",
        )

    def _is_sweep_stopped(self) -> bool:
        return (self._folder / files.STOP_FILE).exists()


class _StopRequest(tune.Stopper):
    """Ends the sweep once somebody has asked for it: what runs is stopped, what waits is not begun."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._file.exists()


def tuner(
    assignment: Mapping[str, Any],
    numbers: Sequence[int],
    resources: Mapping[str, float],
    *,
    folder: Path,
    max_failures: int,
    max_steps: int,
    halving: int | None,
    eta: int,
) -> tune.Tuner:
    """Ray Tune's program of a sweep.

    Args:
        assignment: What every trial is told.
        numbers: Trials that are run, by their place among all.
        resources: That a run takes, by Ray's names.
        folder: For Tune's own files.
        max_failures: Of a trial's process.
        max_steps: Of the longest run.
        halving: Steps after which runs are compared first (ASHA); None: all run to their end.
        eta: Of those that are compared one in so many goes on.
    """
    from ray.tune.schedulers import ASHAScheduler

    scheduler = None
    if halving is not None:
        scheduler = ASHAScheduler(
            time_attr="steps",
            metric="loss",
            mode="min",
            max_t=max(max_steps, halving) + 1,  # a run ends by itself
            grace_period=halving,
            reduction_factor=eta,
        )
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TuneTrial, **assignment),
            {key.lower(): amount for key, amount in resources.items()},
        ),
        param_space={"number": tune.grid_search(list(numbers))},
        tune_config=tune.TuneConfig(
            trial_name_creator=lambda trial: trial.trial_id, scheduler=scheduler
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            stop=_StopRequest(Path(assignment["folder"]) / files.STOP_FILE),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            # Checkpoints are the run's own.
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=0, checkpoint_at_end=False
            ),
        ),
    )
