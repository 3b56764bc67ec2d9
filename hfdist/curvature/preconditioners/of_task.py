"""The empirical Fisher preconditioner of a task's step, across microbatches and ranks."""

from __future__ import annotations

from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.curvature.preconditioners.diagonal import DiagonalPreconditioner, fisher_metric
from hfdist.curvature.preconditioners.empirical_fisher import sum_of_squared_gradients
from hfdist.optim.objective import Operator


def empirical_fisher(context: Context) -> Builder:
    """(sum_i g_i^2 / weight + weight_decay + damping)^-preconditioner_exponent, a diagonal.

    As a metric it has neither damping nor exponent, and the units of the curvature.

    Raises:
        ValueError: The context has no task.
    """
    task, model, options = context.task, context.model, context.options
    if task is None or model is None:
        raise ValueError(
            "preconditioner=empirical_fisher needs the model and data: pass M_func=get_preconditioner(...)"
        )

    def build(problem: Problem, damping: float | None) -> Operator:
        squares = problem.params.zeros()
        for microbatch, batch in context.gradient:
            with problem.evaluation(microbatch):
                squares += sum_of_squared_gradients(
                    problem.params,
                    model,
                    task.loss,
                    task.forward,
                    batch,
                    reduction=task.loss_reduction,
                )
        if damping is None:
            return fisher_metric(problem, problem.comm.all_reduce(squares))
        diagonal = problem.sum_to_part(squares).mul_(problem.gradient_scale)
        diagonal.add_(options.weight_decay)
        exponent = options.preconditioner_exponent
        return DiagonalPreconditioner(diagonal, damping, exponent, overwrites=True)

    return build
