"""Losses of residuals, element by element: half of the square, and robust ones that grow more slowly.

Each has a weight omega(r) = rho'(r) / r: the gradient of sum rho(r) is J' (omega r), and its Gauss-Newton
matrix J' diag(omega) J, that of iteratively reweighted least squares [Holland & Welsch 1977]. Second
derivatives of robust losses, which may be zero or negative, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


@dataclass(frozen=True)
class Robust:
    """rho and omega of r / scale; rho(r) ~ r^2 / 2 for small r."""

    rho: Callable[[Tensor], Tensor]
    omega: Callable[[Tensor], Tensor]


LOSSES: Mapping[str, Robust] = {
    "squares": Robust(lambda r: 0.5 * r.square(), torch.ones_like),
    "huber": Robust(
        lambda r: torch.where(r.abs() <= 1.0, 0.5 * r.square(), r.abs() - 0.5),
        lambda r: 1.0 / r.abs().clamp(min=1.0),
    ),
    "soft_l1": Robust(
        lambda r: torch.sqrt(1.0 + r.square()) - 1.0, lambda r: torch.rsqrt(1.0 + r.square())
    ),
    "cauchy": Robust(lambda r: 0.5 * torch.log1p(r.square()), lambda r: 1.0 / (1.0 + r.square())),
}
"""By their names in `Term.loss`."""


def residual_loss(residuals: Tensor, loss: str = "squares", scale: float = 1.0) -> Tensor:
    """Sum over all elements of scale^2 rho(r / scale), a scalar.

    What computes curvature recognises this function, and takes omega(r / scale) for its second derivative.

    Args:
        residuals: r, of any shape.
        loss: A name in `LOSSES`.
        scale: Size of a residual from which on it counts as an outlier; of no effect on squares.
    """
    if has_torch_function_unary(residuals):
        total: Tensor = handle_torch_function(residual_loss, (residuals,), residuals, loss, scale)
        return total
    if loss == "squares":
        return 0.5 * residuals.square().sum()
    return scale**2 * LOSSES[loss].rho(residuals / scale).sum()


def weights(residuals: Tensor, loss: str = "squares", scale: float = 1.0) -> Tensor:
    """omega(r / scale), of the residuals' shape."""
    return LOSSES[loss].omega(residuals / scale)
