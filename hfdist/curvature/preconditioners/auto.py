"""K-FAC where it knows the layers, the empirical Fisher diagonal elsewhere."""

from __future__ import annotations

from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.curvature.preconditioners.kfac import kfac, statistics_of
from hfdist.curvature.preconditioners.of_task import empirical_fisher
from hfdist.optim.objective import Operator

LEAST_KNOWN = 0.5
"""Share of the parameters in layers that K-FAC knows, below which it does not carry the metric."""


def auto(context: Context) -> Builder:
    """`kfac` if at least half of the parameters are in layers that it knows. Else `empirical_fisher`, which
    takes any model apart by examples; where there are only closures, without examples, still `kfac`."""
    by_layers = kfac(context)
    if context.task is None or context.model is None:
        return by_layers
    by_examples, memory = empirical_fisher(context), context.memory

    def build(problem: Problem, damping: float | None) -> Operator | None:
        if memory.knows_layers is None:  # found out in the first step, and kept
            plan, _ = statistics_of(context, problem, damping)
            unknown = sum(problem.params.tensors[k].numel() for k in plan.others)
            memory.knows_layers = unknown <= (1.0 - LEAST_KNOWN) * problem.numel
        return (by_layers if memory.knows_layers else by_examples)(problem, damping)

    return build
