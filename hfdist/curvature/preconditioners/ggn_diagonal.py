"""Diagonal of the generalized Gauss-Newton matrix, Chapelle & Erhan 2011."""

from __future__ import annotations

from torch import Tensor

from hfdist.curvature.kronecker.diagonal import ggn_diagonal as by_layers
from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.curvature.preconditioners.diagonal import (
    DiagonalPreconditioner,
    floored,
    random_signs,
)
from hfdist.optim.objective import Operator


def ggn_diagonal(context: Context) -> Builder:
    """(diagonal + weight_decay + damping)^-preconditioner_exponent; as a metric without exponent, and
    with a floor relative to each tensor."""
    options = context.options
    taken: list[Tensor] = []  # once a step, whatever its dampings

    def estimate(problem: Problem) -> Tensor:
        kind, samples = options.ggn_diagonal_estimate, options.preconditioner_samples
        if kind == "hutchinson":
            return _hutchinson(problem, samples)
        share = options.preconditioner_examples
        return by_layers(problem, share, None if kind == "exact" else samples)

    def build(problem: Problem, damping: float | None) -> Operator:
        if not taken:
            average = context.memory.diagonal
            decay, refresh = context.decay, context.refresh_of_diagonal
            taken.append(average.take(lambda: estimate(problem), decay, refresh))
        if damping is None:
            diagonal = problem.part_of(floored(problem, taken[0]))
            return DiagonalPreconditioner(diagonal, problem.shift_part(), 1.0, overwrites=True)
        diagonal, shift = problem.part_of(taken[0]), problem.shift_part(damping)
        exponent = options.preconditioner_exponent
        return DiagonalPreconditioner(diagonal, shift, exponent, overwrites=True)

    return build


def _hutchinson(problem: Problem, samples: int) -> Tensor:
    """|mean of v * Bv| [P] over random signs v, a product each (Bekas, Kokiopoulou & Saad 2007): of any
    curvature, also the Hessian, at the price of products and of noise from the elements beside it."""
    B, total = problem.curvature(), None
    for sample in range(samples):
        v = problem.part_of(random_signs(problem, sample))
        vBv = v * (B(v) - problem.shift_part() * v)
        total = vBv if total is None else total + vBv
    assert total is not None
    problem.count_products(samples)
    return problem.whole(total.div_(samples).abs_())
