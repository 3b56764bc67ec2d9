"""What a preconditioner is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hfdist.curvature.microbatch import Microbatch
from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.memory import PreconditionerMemory
from hfdist.optim.objective import Operator
from hfdist.optim.options import HFOptions
from hfdist.optim.secants import REFRESHED
from hfdist.tasks.task import Batch, Task

Builder = Callable[[Problem, float | None], Operator | None]
"""(objective, damping) -> M, of this rank's parts of vectors; called once a solve, after the objective's
gradient, whose weight normalises sums over examples. Collective.

With a damping, M approximates (B + (damping + l2) I)^-1. With None it is the inverse of a metric C, B's
approximation alone (+ l2): in units of B and positive definite relative to itself, so that a factor on the
loss is one on C."""


DECAY = 0.8
"""`preconditioner_decay` where a step sees all examples: statistics are of one random vector an example, and
the mean over some steps has less of that noise than it lags behind."""
STOCHASTIC_DECAY = 0.9
"""The same where a step does not."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One step's model and data."""

    options: HFOptions
    task: Task | None = None
    model: nn.Module | None = None
    gradient: Sequence[tuple[Microbatch, Batch]] = ()
    """This rank's microbatches of the gradient role, and their examples; with task and model, None where
    only functions of the microbatches are known."""
    sees_all_examples: bool = True
    """Whether the gradient's are all that there are; otherwise statistics may be averaged over steps."""
    damping: float = 1.0
    """lambda of the step."""
    memory: PreconditionerMemory = field(default_factory=PreconditionerMemory)
    """What earlier steps left; the run's."""

    of_step: dict[str, Any] = field(default_factory=dict)
    """What was computed in this step, for its next solve."""

    @property
    def refresh_of_diagonal(self) -> int:
        """New statistics of a diagonal are taken every so many steps."""
        refresh = self.options.preconditioner_refresh
        if refresh != "auto":
            return refresh
        return REFRESHED if self.memory.secants.leads else 1

    @property
    def decay(self) -> float:
        """Of moving averages over steps."""
        decay = self.options.preconditioner_decay
        if decay is None:
            return DECAY if self.sees_all_examples else STOCHASTIC_DECAY
        return decay
