"""Eigenvalue-corrected K-FAC, George et al. 2018: see `kronecker.eigen`."""

from __future__ import annotations

from hfdist.curvature.kronecker.memory import Correction
from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.curvature.preconditioners.kfac import block_diagonal, statistics_of
from hfdist.optim.objective import Operator


def ekfac(context: Context) -> Builder:
    """Blocks of layers, diagonal in the eigenvectors of K-FAC's factors; elsewhere as `kfac`."""
    refresh = context.options.ekfac_basis_refresh

    def build(problem: Problem, damping: float | None) -> Operator:
        correction = Correction(refresh=refresh, is_metric=damping is None)
        plan, statistics = statistics_of(context, problem, damping, correction)
        return block_diagonal(context, problem, plan, statistics, damping)

    return build
