"""Diagonal preconditioner of CG, Martens 2010, section 4.7."""

from __future__ import annotations

import torch
from torch import Tensor


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
