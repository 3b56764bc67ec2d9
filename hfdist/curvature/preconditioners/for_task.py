"""The empirical Fisher preconditioner of a task's step, across microbatches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from hfdist.curvature.microbatch import Microbatch
from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.diagonal import DiagonalPreconditioner
from hfdist.curvature.preconditioners.empirical_fisher import sum_of_squared_gradients
from hfdist.optim.objective import Operator
from hfdist.optim.options import HFOptions
from hfdist.tasks.task import Batch, Task


def empirical_fisher(
    problem: Problem,
    task: Task,
    model: nn.Module,
    microbatches: Sequence[tuple[Microbatch, Batch]],
    options: HFOptions,
) -> Callable[[float], Operator]:
    """damping -> M, for `Overrides.preconditioner`; call it after the problem's gradient.

    Args:
        problem: Its gradient's weight normalises the diagonal, its layout says which part of it this
            rank keeps.
        task, model: Of the loss.
        microbatches: This rank's, of the gradient role.
        options: `weight_decay` and `preconditioner_exponent` are used.
    """

    def make(damping: float) -> Operator:
        squares = problem.params.zeros()
        for microbatch, batch in microbatches:
            with problem.evaluation(microbatch):
                squares += sum_of_squared_gradients(
                    problem.params,
                    model,
                    task.loss,
                    task.forward,
                    batch,
                    reduction=task.loss_reduction,
                )
        diagonal = problem.sum_to_part(squares).mul_(problem.gradient_scale)
        diagonal.add_(options.weight_decay)
        return DiagonalPreconditioner(diagonal, damping, options.preconditioner_exponent)

    return make
