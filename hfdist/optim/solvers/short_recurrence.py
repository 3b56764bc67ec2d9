"""Krylov steps of several shifts along one short recurrence: no basis is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hfdist.optim.solvers.solution import System
from hfdist.optim.solvers.subproblems import Projected, Small, Vector

if TYPE_CHECKING:
    from hfdist.optim.solvers.krylov import KrylovSpace


def positive(projected: Projected, shift: float, factor: float) -> Small:
    """(T + shift) y = b, where T + shift is positive definite; not a number elsewhere."""
    shift *= factor
    theta = projected.theta + shift
    if theta[0] <= 1e-14 * float(np.abs(theta).max()):
        return Small(np.full_like(projected.b, np.nan), shift)
    return Small(projected.S @ ((projected.S.T @ projected.b) / theta), shift)


class Shifts:
    """Steps of several shifts along Lanczos' recurrence, without its vectors: CG for shifted systems (Paige
    & Saunders 1975, section 3; Frommer & Maass 1999).

    With T + s = L D L', L unit lower bidiagonal, the columns of P = U L'^-1 follow from one another, and
    U (T + s)^-1 f = P D^-1 L^-1 f is a sum over them, for any f. One f is b; the other is what T has
    between U and the last step.

    Args:
        system: Its damping, in the space's units, times the factors are the shifts.
        factors: On it.
    """

    def __init__(self, system: System, factors: Sequence[float]) -> None:
        self._system = system
        self._factors = factors if system.damping > 0.0 else (1.0,)
        self._sigmas: Vector = np.zeros(0)
        self._pivots: Vector = np.zeros(0)  # of D, [shifts], as all that follows
        self._of_b: Vector = np.zeros(0)  # L^-1 b
        self._of_last: Vector = np.zeros(0)  # L^-1 mixed
        self._P: Tensor | None = None  # [shifts, n]
        self._X: Tensor | None = None  # U (T + s)^-1 b
        self._Z: Tensor | None = None  # U (T + s)^-1 mixed
        self._inside: Tensor | None = None  # [n], what U has of the last step

    @property
    def num_bytes(self) -> int:
        kept = (self._P, self._X, self._Z, self._inside)
        return sum(t.nbytes for t in kept if t is not None)

    def add(self, space: KrylovSpace, j: int, is_last: bool) -> None:
        """Vector j of the space; `is_last`: there is no next one."""
        u, T = space.U.vector(j), space.T
        below = T[j][j - 1] if j else 0.0
        has_last = space.last is not None
        if j == 0:
            shift = self._system.damping * space.unit
            self._sigmas = np.array([shift * factor for factor in self._factors])
            self._P, self._X = (u.new_zeros(len(self._sigmas), len(u)) for _ in range(2))
            if has_last:
                self._Z, self._inside = torch.zeros_like(self._P), torch.zeros_like(u)
        assert self._P is not None
        assert self._X is not None
        with np.errstate(all="ignore"):  # a shift that is too small is left out afterwards
            factors = below / self._pivots if j else np.zeros_like(self._sigmas)
            self._pivots = T[j][j] + self._sigmas - below * factors
            self._of_b = -factors * self._of_b if j else np.full_like(self._sigmas, space.b[0])
        self._P.mul_(self._sent(-factors)).add_(u)
        self._X.addcmul_(self._P, self._sent(self._of_b / self._pivots))
        if self._Z is None or self._inside is None:
            return
        (with_Bd, with_Cd), before = space.to_last[j], space.to_last[j - 1][1] if j else 0.0
        mixed = with_Bd - below * before - T[j][j] * with_Cd
        if not is_last:
            mixed -= T[j + 1][j] * space.to_last[j + 1][1]
        self._of_last = mixed - factors * self._of_last if j else np.full_like(self._sigmas, mixed)
        self._Z.addcmul_(self._P, self._sent(self._of_last / self._pivots))
        self._inside.add_(u, alpha=with_Cd)

    def step(self, shift: float, coordinates: Vector) -> Tensor:
        """The step [n] of a shift.

        Args:
            shift: One of them.
            coordinates: Its own, as `KrylovSpace.step` takes them: that of the last step counts.
        """
        if self._X is None or not coordinates.any():
            return torch.zeros_like(self._system.b)
        row = int(np.abs(self._sigmas - shift).argmin())
        x, of_last = self._X[row].clone(), float(coordinates[-1])
        if self._Z is not None and self._inside is not None and of_last != 0.0:
            assert self._system.start is not None
            x.sub_(self._Z[row], alpha=of_last).sub_(self._inside, alpha=of_last)
            x.add_(self._system.start, alpha=of_last)
        return x

    def _sent(self, factors: Vector) -> Tensor:
        """[shifts, 1] beside the vectors; without waiting."""
        b = self._system.b
        return torch.from_numpy(factors).to(b.device, b.dtype, non_blocking=True)[:, None]
