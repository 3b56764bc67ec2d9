"""Diagonal preconditioner of CG, Martens 2010, section 4.7."""

from __future__ import annotations

import torch
from torch import Tensor

from hfdist.curvature.objective import Problem
from hfdist.devices import sent

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
        overwrites: Each call overwrites what the last one returned, so that a solver's iterations take no
            memory.

    Raises:
        ValueError: A negative damping.
    """

    def __init__(
        self,
        diagonal: Tensor,
        damping: float | Tensor,
        exponent: float = 0.75,
        *,
        overwrites: bool = False,
    ) -> None:
        if not isinstance(damping, Tensor) and damping < 0.0:
            raise ValueError(f"damping is {damping}: it must be at least 0")
        damped = diagonal + damping
        # Without damping an unused parameter has a zero here, and 0 * inf is NaN. Its residual is
        # zero, so that any finite value serves.
        damped = torch.where(damped == 0.0, torch.ones_like(damped), damped)
        self.inverse = damped.pow_(-exponent)  # [P]
        self._overwrites = overwrites
        self._out: Tensor | None = None

    def __call__(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """M^-1 v, [P]; written into `out` (which may be v itself) if given."""
        if out is None and self._overwrites:
            if self._out is None:
                self._out = torch.empty_like(v)
            out = self._out
        return torch.mul(v, self.inverse, out=out)


def fisher_metric(problem: Problem, squares: Tensor) -> DiagonalPreconditioner:
    """Inverse of cF: F is the diagonal with a floor, and c the mean diagonal element of F^-1/2 B F^-1/2, by
    one product with random signs. So it has the units of B, which grows with the loss; F with its square.

    Args:
        problem: The objective.
        squares: F, [P], up to a factor.
    """
    F = floored(problem, squares)
    v = problem.part_of(F.rsqrt().mul_(random_signs(problem)))
    Bv = problem.curvature()(v) - problem.shift_part() * v
    problem.count_products(1)
    c = float(problem.total(torch.dot(v.double(), Bv.double()))) / problem.numel
    diagonal = problem.part_of(F) * (c if c > 0.0 else 1.0)
    return DiagonalPreconditioner(diagonal, problem.shift_part(), 1.0, overwrites=True)


def floored(problem: Problem, diagonal: Tensor) -> Tensor:
    """A diagonal [P], positive: RELATIVE_FLOOR times the mean over each tensor is added to it."""
    pieces = problem.params.pieces(diagonal)
    means = [float(piece.double().mean()) for piece in pieces]
    typical = sum(means) / len(means)
    floors = [RELATIVE_FLOOR * (mean or typical or 1.0) for mean in means]
    return diagonal + problem.params.spread(floors)


def random_signs(problem: Problem, number: int = 0) -> Tensor:
    """A vector [P] of +1 and -1, the same on all ranks."""
    generator = torch.Generator().manual_seed(number)
    signs = torch.randint(0, 2, (problem.numel,), generator=generator).mul_(2).sub_(1)
    return sent(signs, problem.params.device, problem.params.dtype)
