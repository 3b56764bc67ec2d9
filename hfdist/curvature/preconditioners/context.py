"""What a preconditioner is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from hfdist.curvature.microbatch import Microbatch
from hfdist.curvature.objective import Problem
from hfdist.optim.objective import Operator
from hfdist.optim.options import HFOptions
from hfdist.tasks.task import Batch, Task

Builder = Callable[[Problem, float], Operator]
"""(objective, damping) -> M, of this rank's parts of vectors; called once a solve, after the objective's
gradient, whose weight normalises sums over examples. Collective."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One step's model and data."""

    task: Task
    model: nn.Module
    gradient: Sequence[tuple[Microbatch, Batch]]
    """This rank's microbatches of the gradient role, and their examples."""
    options: HFOptions
