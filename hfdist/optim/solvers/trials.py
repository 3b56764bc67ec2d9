"""Steps for one lambda after the other, each tried when the one before has failed: Levenberg-Marquardt within
a step, with geodesic acceleration [Transtrum & Sethna 2012, arXiv:1201.5885]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfdist.optim.least_squares import LeastSquares, LeastSquaresOptions
from hfdist.optim.solvers.solution import Candidate

FACTORS = tuple(2.0**k for k in (0, 1, 2, 3, 5, 7, 10, 14, 19, 25, 32))
"""lambda of the trials, in the step's: doubled, and faster where that does not help."""
FALLING = tuple(10.0**-k for k in range(1, 13))
"""The same, where the first one helps and nothing is known of the right lambda; these steps are not bent, for
which they would cost three times as much."""
_H = 0.1
"""Length of the difference for the second derivative, in steps [sec. 3.2]."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model at a step v."""

    m: float
    """Undamped."""
    vDv: float
    Jv: Tensor | None = None
    """[N], where the model was computed from it."""


class Trials(Sequence[Candidate]):
    """The candidates of rising lambda, then those of falling lambda, and their steps: computed when they are
    asked for.

    Args:
        damping: The first lambda; the only one if it is 0.
        iteration: Of all candidates.
        solve: lambda -> v [P], the minimiser of the damped model.
        models: v -> the model there.
        bent: lambda, w [N] -> (B + lambda D)^-1 J'w [P]; None: no acceleration.
        least_squares: For the acceleration.
        options: `geodesic_*`.
    """

    def __init__(
        self,
        *,
        damping: float,
        iteration: int,
        solve: Callable[[float], Tensor],
        models: Callable[[Tensor], Model],
        options: LeastSquaresOptions,
        least_squares: LeastSquares | None = None,
        bent: Callable[[float, Tensor], Tensor] | None = None,
    ) -> None:
        factors = (*FACTORS, *FALLING) if damping > 0.0 else (1.0,)
        self._dampings = [factor * damping for factor in factors]
        self.falling = range(len(FACTORS), len(factors))
        """Indices of the candidates of falling lambda."""
        self._iteration, self._solve, self._models = iteration, solve, models
        self._options, self._least_squares, self._bent = options, least_squares, bent
        self._plain: dict[int, Tensor] = {}
        self._candidates: dict[int, Candidate] = {}
        self._images: dict[int, Tensor | None] = {}  # Jv
        self._steps: dict[int, Tensor] = {}
        self.last_plain: Tensor | None = None
        """The last v that was computed [P]; the same memory for all."""

    def __len__(self) -> int:
        return len(self._dampings)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if index not in self._candidates:
            damping, model = self._dampings[index], self._models(self._v(index))
            self._images = {index: model.Jv}
            self._candidates[index] = Candidate(
                iteration=self._iteration,
                model=model.m + 0.5 * damping * model.vDv,
                undamped_model=model.m,
                damping=damping,
            )
        return self._candidates[index]

    def step(self, index: int) -> Tensor:
        """v + a/2 [P], corrected further; v where a is large, and of falling lambda."""
        if index not in self._steps:
            before = [k for k in self._steps if k < index in self.falling][-1:]  # may be taken yet
            self._steps = {k: self._steps[k] for k in before}
            self._steps[index] = self._accelerated(index)
        return self._steps[index]

    def _v(self, index: int) -> Tensor:
        if index not in self._plain:
            v = self._solve(self._dampings[index])
            self._plain = {index: v}
            if self.last_plain is None:
                self.last_plain = torch.empty_like(v)
            self.last_plain.copy_(v)
        return self._plain[index]

    def _accelerated(self, index: int) -> Tensor:
        v, ls = self._v(index), self._least_squares
        is_bent = self._options.geodesic_acceleration and index not in self.falling
        if ls is None or self._bent is None or not is_bent:
            return v
        damping = self._dampings[index]
        self[index]  # its model may know Jv
        Jv = self._images.get(index)
        hJv = None if Jv is None else _H * Jv
        second = ls.remainder(_H * v, hJv).mul_(2.0 / _H**2)  # r_vv
        if not bool(torch.isfinite(second).all()):
            return v
        a = -self._bent(damping, second)
        if 2.0 * float(a.norm()) > self._options.geodesic_limit * float(v.norm()):
            return v
        step, change = torch.add(v, a, alpha=0.5), 0.5 * float(a.norm())
        for _ in range(self._options.geodesic_corrections):
            further = v - self._bent(damping, ls.remainder(step))
            before, change = change, float((further - step).norm())
            if not change < before:
                break
            step = further
        return step
