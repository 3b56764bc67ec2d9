"""Preconditioners of CG: approximations of (B + damping I)^-1 that are cheap to apply."""

from hfdist.curvature.preconditioners.diagonal import DiagonalPreconditioner
from hfdist.curvature.preconditioners.empirical_fisher import (
    empirical_fisher_diagonal,
    sum_of_squared_gradients,
)

__all__ = ["DiagonalPreconditioner", "empirical_fisher_diagonal", "sum_of_squared_gradients"]
