"""Diagonal preconditioner of CG, Martens 2010, section 4.7."""

from __future__ import annotations

import torch
from torch import Tensor

from hfdist.curvature.objective import Problem

RELATIVE_FLOOR = 1e-3
"""Least element of a metric's diagonal, in units of the mean over its parameter tensor."""


class DiagonalPreconditioner:
    """M^-1: v -> v / (diagonal + damping)^exponent.

    The exponent below one flattens the spread of the diagonal, which is a rough estimate.

    Args:
        diagonal: Non-negative estimate of the curvature's diagonal, [P], of the global mean.
        damping: lambda >= 0, plus the L2 coefficient where there is one; one value, or one an
            element, [P].
        exponent: xi in (diag + lambda)^xi; 1 is Jacobi's preconditioner, 0 none.

    Raises:
        ValueError: A negative damping.
    """

    def __init__(self, diagonal: Tensor, damping: float | Tensor, exponent: float = 0.75) -> None:
        if not isinstance(damping, Tensor) and damping < 0.0:
            raise ValueError(f"damping is {damping}: it must be at least 0")
        damped = diagonal + damping
        # Without damping an unused parameter has a zero here, and 0 * inf is NaN. Its residual is
        # zero, so that any finite value serves.
        damped = torch.where(damped == 0.0, torch.ones_like(damped), damped)
        self.inverse = damped.pow_(-exponent)  # [P]

    def __call__(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """M^-1 v, [P]; written into `out` (which may be v itself) if given."""
        return torch.mul(v, self.inverse, out=out)


def fisher_metric(problem: Problem, squares: Tensor) -> DiagonalPreconditioner:
    """Inverse of cF: F is the diagonal with a floor, and c the mean diagonal element of F^-1/2 B F^-1/2, by
    one product with random signs. So it has the units of B, which grows with the loss; F with its square.

    Args:
        problem: The objective.
        squares: F, [P], up to a factor.
    """
    params = problem.params
    F = squares  # [P]
    means = [float(piece.double().mean()) for piece in params.pieces(F)]
    typical = sum(means) / len(means)
    for piece, mean in zip(params.pieces(F), means):
        piece.add_(RELATIVE_FLOOR * (mean or typical or 1.0))
    generator = torch.Generator().manual_seed(0)
    signs = (
        torch.randint(0, 2, (params.numel,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    )
    v = problem.part_of(F.rsqrt().mul_(signs.to(F)))
    Bv = problem.curvature()(v) - problem.shift_part() * v
    c = float(problem.total(torch.dot(v.double(), Bv.double()))) / params.numel
    diagonal = problem.part_of(F) * (c if c > 0.0 else 1.0) + problem.shift_part()
    return DiagonalPreconditioner(diagonal, 0.0, 1.0)
