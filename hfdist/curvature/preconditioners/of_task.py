"""The empirical Fisher preconditioner of a task's step, across microbatches and ranks."""

from __future__ import annotations

from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.curvature.preconditioners.diagonal import DiagonalPreconditioner
from hfdist.curvature.preconditioners.empirical_fisher import sum_of_squared_gradients
from hfdist.optim.objective import Operator


def empirical_fisher(context: Context) -> Builder:
    """(sum_i g_i^2 / weight + weight_decay + damping)^-preconditioner_exponent, a diagonal."""
    task, options = context.task, context.options

    def build(problem: Problem, damping: float) -> Operator:
        squares = problem.params.zeros()
        for microbatch, batch in context.gradient:
            with problem.evaluation(microbatch):
                squares += sum_of_squared_gradients(
                    problem.params,
                    context.model,
                    task.loss,
                    task.forward,
                    batch,
                    reduction=task.loss_reduction,
                )
        diagonal = problem.sum_to_part(squares).mul_(problem.gradient_scale)
        diagonal.add_(options.weight_decay)
        return DiagonalPreconditioner(diagonal, damping, options.preconditioner_exponent)

    return build
