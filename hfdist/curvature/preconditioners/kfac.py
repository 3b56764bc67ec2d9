"""Kronecker-factored approximation of the generalized Gauss-Newton matrix, Martens & Grosse 2015.

Of a layer y = Wx + b the block of (W, b) is A x G: A the mean over the examples of xx', with a 1 appended
to x for the bias, and G the sum of gg', g = (dz/dy)'s with random s whose mean outer product is the loss's
Hessian in the outputs z (`loss_root`), so that the block is in units of the curvature. Convolutions are such
layers of patches (Grosse & Martens 2016), embeddings of one-hot inputs, recurrent layers of each time step
(Martens, Ba & Johnson 2018, independent steps). Gains and biases have blocks of their own from each example's
derivatives; a parameter of no known layer has a multiple of the identity.
"""

from __future__ import annotations

from torch import Tensor

from hfdist.curvature.kronecker.blocks import inverted
from hfdist.curvature.kronecker.keys import BlockPlan
from hfdist.curvature.kronecker.memory import Correction
from hfdist.curvature.kronecker.statistics import Sampling, Statistics
from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.optim.objective import Operator

RELATIVE_DAMPING = 0.2
"""What a metric adds to each factor, and to each block without factors, in units of its mean diagonal
element, times the root of the step's lambda: two factors add a part of lambda's own to their product. Early
steps, of a large lambda, have no use for what the metric says of flat directions; late ones need it. Blocks
that were seen to be further from the curvature than others get more (see `kronecker.ratios`)."""

BESIDE_SECANTS = 1e-3
"""The same in steps without products, where pairs mend what the blocks say too little of."""


def kfac(context: Context) -> Builder:
    """Blocks of layers; multiples of the identity elsewhere."""

    def build(problem: Problem, damping: float | None) -> Operator:
        plan, statistics = statistics_of(context, problem, damping)
        return block_diagonal(context, problem, plan, statistics, damping)

    return build


def block_diagonal(
    context: Context,
    problem: Problem,
    plan: BlockPlan,
    statistics: Statistics,
    damping: float | None,
) -> Operator:
    """The inverse of the blocks, damped."""
    if damping is not None:
        inverse = inverted(problem, plan, statistics, damping)
    else:
        relative = RELATIVE_DAMPING * min(context.damping, 1.0) ** 0.5
        of_secants = context.memory.secants.leads
        if of_secants:
            relative = BESIDE_SECANTS
        ratios = _ratios(context, problem)
        inverse = context.memory.statistics.metric(
            problem, plan, statistics, relative, ratios, of_secants
        )
    return problem.of_whole(inverse.operator(problem.params))


def _ratios(context: Context, problem: Problem) -> Tensor | None:
    """Of this step, whatever its solves."""
    if "ratios" not in context.of_step:
        context.of_step["ratios"] = context.memory.ratios.begin(problem)
    ratios: Tensor | None = context.of_step["ratios"]
    return ratios


def statistics_of(
    context: Context,
    problem: Problem,
    damping: float | None,
    correction: Correction | None = None,
) -> tuple[BlockPlan, Statistics]:
    """A step's statistics, taken once, whatever its dampings. Collective the first time."""
    options, step = context.options, context.of_step
    if "kfac" not in step:
        sampling = Sampling(
            share=max(options.preconditioner_examples, _share_of_full_rank(problem)),
            samples=options.preconditioner_samples,
            shared=options.kfac_shared,
        )
        refresh = options.preconditioner_refresh
        if refresh == "auto" and damping is not None:
            refresh = 1  # the inverses of such solvers are of their own damping, in each step
        step["kfac"] = context.memory.statistics.take(
            problem, sampling, context.decay, refresh, correction, min(context.damping, 1.0)
        )
    plan, statistics = step["kfac"]
    return plan, statistics


def _share_of_full_rank(problem: Problem) -> float:
    """Share of the examples that is as many as the widest layer has inputs: with fewer, directions that they
    miss look flat."""
    matrices = [t for t in problem.params.tensors if t.ndim > 1]
    widest = max((t.numel() // t.shape[0] for t in matrices), default=0)
    return min(1.0, widest / problem.gradient_weight)
