"""The metric D of the damping term lambda D."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Context
from hfdist.curvature.preconditioners.diagonal import DiagonalPreconditioner
from hfdist.curvature.preconditioners.of_task import empirical_fisher


def make_damping_metric(context: Context) -> Callable[[Problem], Tensor] | None:
    """What `damping_metric` asks for, for `Overrides.damping_metric`; None for the identity.

    "diagonal" is scale-sensitive damping [2, sec. 8.3]: D is a diagonal estimate of the curvature itself, the
    empirical Fisher's in the curvature's units, so that lambda is a number without a unit, and weights that
    matter more move less.
    """
    if context.options.damping_metric == "identity":
        return None
    build = empirical_fisher(context)

    def diagonal(problem: Problem) -> Tensor:
        metric = build(problem, None)
        assert isinstance(metric, DiagonalPreconditioner)
        return metric.inverse.reciprocal()  # this rank's part [n]

    return diagonal
