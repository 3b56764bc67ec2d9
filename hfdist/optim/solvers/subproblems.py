"""The small problem inside a Krylov space: steps for many values of lambda, at no further product.

In a basis U [n, m] of steps x = U y, orthonormal in the metric C, the step's model is
m(y) = y'Ty/2 - b'y with T = U'BU, b = U'(-g), and |x|_C = |y|. All of it is float64 on the host: m is small.
Negative curvature in the space is handled exactly, by the eigenvalues of T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating[Any]]
Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Projected:
    """A step's model in the space."""

    T: Matrix
    """U'BU [m, m], symmetric."""
    b: Vector
    """U'(-g) [m]."""
    beta: float = 0.0
    """|B u_m - U T e_m| in the metric's inverse: what the last product has outside the space; 0 where it is
    not known."""
    last: int = -1
    """Place of u_m."""

    @cached_property
    def theta(self) -> Vector:
        """Eigenvalues of T [m], rising."""
        return self._eigen[0]

    @cached_property
    def S(self) -> Matrix:
        """Their vectors [m, m], one a column."""
        return self._eigen[1]

    @cached_property
    def _eigen(self) -> tuple[Vector, Matrix]:
        theta, S = np.linalg.eigh(self.T)
        return theta, S

    def model(self, y: Vector) -> float:
        """m(y), undamped."""
        return float(0.5 * y @ self.T @ y - self.b @ y)


@dataclass(frozen=True)
class Small:
    """A step in the space and the shift that belongs to it: y solves (T + shift) y = b, up to the rule's
    handling of negative curvature."""

    y: Vector
    shift: float


Subproblem = Callable[[Projected, float, float], Small]
"""(the model, shift, factor) -> the step of the rule where the step's present shift is multiplied by the
factor, or what corresponds to it."""


def damping(projected: Projected, shift: float, factor: float) -> Small:
    """(|T| + shift) y = b: negative curvature counts by its size, as in saddle-free Newton, Dauphin et al.
    2014."""
    shift *= factor
    return Small(_filtered(projected, 1.0 / _positive(np.abs(projected.theta) + shift)), shift)


def trust_region(projected: Projected, shift: float, factor: float) -> Small:
    """min m(y) over |y| <= radius, exactly, Gould et al. 1999 (GLTR), Conn et al. 2000 (sec. 7.3).

    The radius is that of the damped step at `shift`, over the square root of the factor.
    """
    radius = float(np.linalg.norm(damping(projected, shift, 1.0).y)) / np.sqrt(factor)
    theta, b = projected.theta, projected.S.T @ projected.b
    least = max(0.0, -float(theta[0]))

    def size(mu: float) -> float:
        return float(np.linalg.norm(b / _positive(theta + mu)))

    scale = max(float(np.abs(theta).max()), np.finfo(np.float64).tiny)
    edge = least + 1e-14 * scale
    if theta[0] > 0.0 and size(0.0) <= radius:
        return Small(_filtered(projected, 1.0 / theta), 0.0)  # inside
    if size(edge) <= radius:
        # The hard case: b has nothing along the lowest curvature, and the boundary is reached along it.
        y = b / _positive(theta + edge)
        return Small(projected.S @ _lengthened(y, radius), edge)
    low, high = edge, least + float(np.linalg.norm(b)) / radius
    for _ in range(200):  # size falls in mu; halving in the logarithm where the ends are far apart
        mu = np.sqrt(low * high) if low > 0.0 and high > 4.0 * low else 0.5 * (low + high)
        low, high = (mu, high) if size(mu) > radius else (low, mu)
        if high - low <= 1e-15 * high:
            break
    return Small(_filtered(projected, 1.0 / _positive(theta + high)), high)


def cubic(projected: Projected, shift: float, factor: float) -> Small:
    """min m(y) + sigma/3 |y|^3, exactly, Cartis et al. 2011 (ARC): (T + mu) y = b with mu = sigma |y|.

    sigma is that of the damped step at `shift`, times the factor.
    """
    start = float(np.linalg.norm(damping(projected, shift, 1.0).y))
    if start == 0.0 or shift == 0.0:
        return damping(projected, shift, factor)
    sigma = factor * shift / start
    theta, b = projected.theta, projected.S.T @ projected.b
    least = max(0.0, -float(theta[0]))
    scale = max(float(np.abs(theta).max()), np.finfo(np.float64).tiny)

    def excess(mu: float) -> float:  # rises in mu
        return mu - sigma * float(np.linalg.norm(b / _positive(theta + mu)))

    low = least + 1e-14 * scale
    if excess(low) >= 0.0:
        if least == 0.0:
            return Small(_filtered(projected, 1.0 / _positive(theta + low)), low)
        y = b / _positive(theta + low)
        return Small(projected.S @ _lengthened(y, low / sigma), low)
    high = 2.0 * low + shift * factor
    while excess(high) < 0.0:
        high *= 2.0
    for _ in range(200):
        mu = np.sqrt(low * high) if high > 4.0 * low else 0.5 * (low + high)
        low, high = (mu, high) if excess(mu) < 0.0 else (low, mu)
        if high - low <= 1e-15 * high:
            break
    return Small(_filtered(projected, 1.0 / _positive(theta + high)), high)


def minres(projected: Projected, shift: float, factor: float) -> Small:
    """The least residual |b - Bx| in the metric's inverse, Paige & Saunders 1975, with damping:
    (T^2 + beta^2 e e' + shift^2) y = |T| b, e the place of u_m; |T| turns ascent along negative curvature
    into descent."""
    shift *= factor
    S, size = projected.S, np.abs(projected.theta)
    absolute = (S * size) @ S.T
    normal = absolute @ absolute
    normal[projected.last, projected.last] += projected.beta**2
    normal[np.diag_indices_from(normal)] += max(shift**2, np.finfo(np.float64).tiny)
    return Small(np.linalg.solve(normal, absolute @ projected.b), shift)


SUBPROBLEMS: dict[str, Subproblem] = {
    "damping": damping,
    "trust_region": trust_region,
    "cubic": cubic,
    "minres": minres,
}
"""By their names in `krylov_subproblem`."""


def _lengthened(y: Vector, length: float) -> Vector:
    """y with as much of the first eigenvector as gives it the length, in the direction that it has."""
    rest = float(y[1:] @ y[1:])
    y[0] = np.copysign(np.sqrt(max(length**2 - rest, 0.0)), y[0])
    return y


def _filtered(projected: Projected, factors: Vector) -> Vector:
    """S diag(factors) S'b."""
    return projected.S @ (factors * (projected.S.T @ projected.b))


def _positive(values: Vector) -> Vector:
    """Values, kept off zero: an eigenvalue of zero without damping asks for a step without end."""
    largest = float(np.abs(values).max(initial=0.0))
    return np.maximum(values, max(1e-14 * largest, np.finfo(np.float64).tiny))
