"""The normal equations in the space of the residuals: for fewer residuals N than parameters P.

(J'J + lambda I)^-1 J' = J' (JJ' + lambda I)^-1 (ENGD-W, Guzman-Cordero et al. 2025, arXiv:2505.21404; the
same is minSR), with the momentum of SPRING (Goldshlager et al. 2024, arXiv:2401.10190) as an option; of more
residuals than a matrix can have rows by CG (see `nystrom.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hfdist.optim.least_squares import LeastSquares, LeastSquaresOptions
from hfdist.optim.report import Stop
from hfdist.optim.solvers.cg import CGOptions
from hfdist.optim.solvers.dense import nothing
from hfdist.optim.solvers.nystrom import Nystrom, NystromOptions
from hfdist.optim.solvers.shifted import Shifted
from hfdist.optim.solvers.solution import Solution, System
from hfdist.optim.solvers.trials import Model, Trials


class Options(LeastSquaresOptions, NystromOptions, CGOptions):
    """What is read of the options."""


_SAME = 1e-9
"""Relative size of b + J'r that counts as rounding."""


def solve(system: System, options: Options) -> Solution:
    """(J'J + mu I) x = b with mu = weight_decay + lambda, for one lambda after the other.

    Raises:
        ValueError: There are no residuals, vectors lie in parts on the ranks, or the damping or the L2 term
            is not one for all parameters.
    """
    ls, b = system.least_squares, system.b
    if ls is None:
        raise ValueError(
            "solver=sample_space needs residuals: a task that returns them, or another solver"
        )
    if system.space.is_sharded:
        raise ValueError(
            "solver=sample_space holds whole vectors: it needs shard_solver_state=false"
        )
    decay = ls.weight_decay
    if system.damping_scale is not None or isinstance(decay, Tensor):
        raise ValueError(
            "solver=sample_space takes one damping_scale and one weight_decay for all parameter groups"
        )
    if not bool(b.any()):
        return nothing(system, Stop.ZERO_GRADIENT)

    def told(number: int) -> None:
        if system.on_iteration is not None:
            system.on_iteration(number, float(system.space.read_signal(b)))

    r = ls.residuals()
    inverse = _inverse(ls, r, options, told)
    if inverse is None:
        return nothing(system, Stop.NON_FINITE)
    start = system.start if options.momentum else None
    if start is not None:
        start = options.cg_decay_x0 * start
    space = _SampleSpace(ls, inverse, r, b, start)

    def models(v: Tensor) -> Model:
        Jv, vv = ls.times(v), float(torch.dot(v, v))
        m = float(0.5 * torch.dot(Jv, Jv) - torch.dot(b, v)) + 0.5 * decay * vv
        return Model(m=m, vDv=vv, Jv=Jv)

    trials = Trials(
        damping=system.damping,
        iteration=1,
        solve=lambda damping: space.step(decay, damping),
        models=models,
        options=options,
        least_squares=ls,
        bent=lambda damping, w: ls.transposed_times(space.solve(decay + damping, w)),
    )
    first = trials[0]
    if isinstance(inverse, Nystrom):
        iterations = max(inverse.iterations, 1)
        residual, num_bytes = inverse.residual, inverse.num_bytes
        is_solved = residual <= options.sample_tolerance
    else:
        told(1)
        iterations, residual, is_solved = 1, 0.0, True
        num_bytes = 2 * len(r) ** 2 * r.itemsize
    return Solution(
        candidates=trials,
        step=trials.step,
        is_path=False,
        takes_first=True,
        falling=() if options.momentum else trials.falling,
        next_start=trials.last_plain if options.momentum else None,
        quadratic=[0.0, first.model],
        iterations=iterations,
        stop=Stop.RESIDUAL if is_solved else Stop.MAX_ITERATIONS,
        residual=residual,
        num_products=0,  # of rows, which the residuals count
        num_bytes=num_bytes + 4 * b.nbytes,
    )


def _inverse(
    ls: LeastSquares, r: Tensor, options: Options, told: Callable[[int], None]
) -> Shifted | Nystrom | None:
    """Solves with JJ' + mu I; None where JJ' is not finite."""
    if options.sample_rank is None:
        K = ls.kernel()
        return Shifted(K) if bool(torch.isfinite(K).all()) else None
    nystrom = Nystrom(ls.kernel_times, r, options, told)
    return nystrom if nystrom.is_finite else None


class _SampleSpace:
    """Solves with JJ' + mu I, and what follows from them in the space of the parameters."""

    def __init__(
        self,
        ls: LeastSquares,
        inverse: Shifted | Nystrom,
        r: Tensor,
        b: Tensor,
        start: Tensor | None,
    ) -> None:
        self._ls, self._inverse, self._r, self._start = ls, inverse, r, start
        # What is no combination of the rows of J: the L2 term, or the gradient of other examples.
        rest = b + ls.gradient()
        self._rest = rest if float(rest.norm()) > _SAME * float(b.norm()) else None

    def solve(self, mu: float, w: Tensor) -> Tensor:
        """(JJ' + mu I)^-1 w [N]."""
        return self._inverse.solve(mu, w)

    def step(self, decay: float, damping: float) -> Tensor:
        """x [P] with (J'J + mu I) x = b + lambda start. With b + lambda start = -J'r + e:

        x = J' (JJ' + mu I)^-1 (-r - Je / mu) + e / mu.
        """
        mu, e = decay + damping, self._rest
        if self._start is not None:
            pull = damping * self._start
            e = pull if e is None else e + pull
        if e is None or mu == 0.0:
            return self._ls.transposed_times(self.solve(mu, -self._r))
        w = -self._r - self._ls.times(e) / mu
        return self._ls.transposed_times(self.solve(mu, w)).add_(e, alpha=1.0 / mu)
