"""What solvers of least-squares problems need to know of the residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from hfdist.optim.option_group import OptionGroup


class LeastSquares(Protocol):
    """f(theta) = |r(theta)|^2 / 2 and its L2 term, linearized: r(theta + v) ~ r + Jv.

    Residuals carry the square roots of their weights (and of the weights of robust losses), so that J'J is
    the Gauss-Newton matrix and J'r the gradient, both without the L2 term. Vectors are whole and the same on
    every rank, [P] or [N], N the residuals of all ranks; every method is collective.
    """

    @property
    def num_residuals(self) -> int:
        """N."""
        ...

    @property
    def weight_decay(self) -> float | Tensor:
        """Of the L2 term; a scalar, or a diagonal [P]."""
        ...

    def residuals(self) -> Tensor:
        """r [N]."""
        ...

    def gradient(self) -> Tensor:
        """J'r [P], known from the rows' making."""
        ...

    def gram(self) -> Tensor:
        """J'J [P, P]."""
        ...

    def kernel(self) -> Tensor:
        """JJ' [N, N]."""
        ...

    def kernel_times(self, w: Tensor) -> Tensor:
        """JJ'w [N], or JJ'W [N, k], without the matrix JJ'."""
        ...

    def times(self, v: Tensor) -> Tensor:
        """Jv [N]."""
        ...

    def transposed_times(self, w: Tensor) -> Tensor:
        """J'w [P]."""
        ...

    def remainder(self, v: Tensor, Jv: Tensor | None = None) -> Tensor:
        """r(theta + v) - r - Jv [N], what is not linear in v; weights of robust losses are those at theta.
        Jv may be given where it is known."""
        ...


@dataclass(frozen=True, kw_only=True)
class LeastSquaresOptions(OptionGroup):
    """Solvers that assemble a matrix (`dense`, `sample_space`)."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "geodesic_limit": (0.0, math.inf),
        "geodesic_corrections": (0, 100),
    }

    geodesic_acceleration: bool = True
    """Correct a step v by half of the second derivative a of the path that follows the residuals, at the
    price of one more evaluation of the residuals [Transtrum & Sethna 2012, arXiv:1201.5885]."""
    geodesic_limit: float = 0.75
    """The correction is taken where 2 |a| is at most this times |v|; otherwise the step is v."""
    geodesic_corrections: int = 1
    """Further corrections of the step, at the same price each: fixed-point iterations for the d with
    J'(r(theta + d) - r - Jd) + (J'J + lambda)(d - v) = 0, whose first order is a/2. They end where they no
    longer shrink."""
    momentum: bool = False
    """sample_space: minimise |J x + r|^2 + lambda |x - cg_decay_x0 x_before|^2, x_before the last step
    (SPRING, Goldshlager et al. 2024, arXiv:2401.10190)."""
