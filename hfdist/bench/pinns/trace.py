"""Errors of a contender by seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from hfdist.bench.optimizers.arena import Run
from hfdist.comm import SerialCommunicator
from hfdist.config.job import RunConfig
from hfdist.devices import resolve
from hfdist.errors import ConfigError
from hfdist.tasks.task import Task
from hfdist.training.evaluation import Evaluator

ERROR = "relative_error"
"""The metric: |u - exact| / |exact| over the evaluation points."""
MARKS = 40
FIRST_MARK = 0.01
"""Errors are looked at so often, from this part of the seconds on, evenly by its logarithm."""


@dataclass(kw_only=True)
class Trace:
    """What became of a contender."""

    optimizer: str
    setting: str
    seed: int
    updates: int = 0
    loss: float = math.inf
    """After the last update, or of the last one."""
    seconds: list[float] = field(default_factory=list)
    """Training time until the errors were looked at; that itself takes none."""
    errors: list[float] = field(default_factory=list)
    """Relative errors in L2; infinite where there is no number."""

    @property
    def error(self) -> float:
        """At the end."""
        return self.errors[-1] if self.errors else math.inf

    def error_at(self, seconds: float) -> float:
        """The last that was looked at until then."""
        known = [error for at, error in zip(self.seconds, self.errors) if at <= seconds]
        return known[-1] if known else math.inf

    def first(self, error: float) -> float:
        """Seconds until the error was first no more than this; infinite if it never was."""
        return next((at for at, e in zip(self.seconds, self.errors) if e <= error), math.inf)


class Watch:
    """Looks at the errors of contenders now and then.

    Args:
        task, config: The problem.
        seconds: Of every contender.

    Raises:
        ConfigError: The task has no known solution.
    """

    def __init__(self, task: Task, config: RunConfig, seconds: float) -> None:
        comm = SerialCommunicator(resolve(config.device, local_rank=0))
        self._evaluator = Evaluator(task, config, comm)
        if not self._evaluator.has_data:
            raise ConfigError(
                f"{config.task} has no known solution: define solution() and evaluation_points() to compare "
                "errors"
            )
        ratio = FIRST_MARK ** (1.0 / (MARKS - 1))
        self._marks = [seconds * ratio**k for k in reversed(range(MARKS))]
        self._traces: dict[int, Trace] = {}
        self._name = config.task

    def __call__(self, run: Run) -> None:
        """After an update."""
        trace, at = self._trace(run), run.curve.seconds[-1]
        passed = sum(mark <= at for mark in self._marks)
        before = sum(mark <= trace.seconds[-1] for mark in self._marks) if trace.seconds else 0
        if passed > before:
            self._look(trace, run, at)

    def finish(self, run: Run) -> Trace:
        """The contender is at its end."""
        trace, at = self._trace(run), run.curve.seconds[-1]
        if not trace.seconds or trace.seconds[-1] < at:
            self._look(trace, run, at)
        del self._traces[id(run)]  # another run may get its place in memory
        trace.updates, trace.loss = run.curve.updates[-1], run.curve.losses[-1]
        return trace

    def _trace(self, run: Run) -> Trace:
        c = run.curve
        new = Trace(optimizer=c.optimizer, setting=c.setting, seed=c.seed)
        return self._traces.setdefault(id(run), new)

    def _look(self, trace: Trace, run: Run, at: float) -> None:
        trace.seconds.append(at)
        trace.errors.append(self._error(run.model))

    def _error(self, model: nn.Module) -> float:
        found = self._evaluator.of(model)
        if ERROR not in found:
            raise ConfigError(
                f"{self._name} has no metric {ERROR!r}: errors are compared of tasks that return residuals"
            )
        return found[ERROR] if math.isfinite(found[ERROR]) else math.inf
