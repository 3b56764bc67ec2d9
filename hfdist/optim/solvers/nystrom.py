"""(K + mu I)^-1 for many mu, of a K that is too large to be written out: conjugate gradients, preconditioned
by a randomised low-rank approximation.

K's eigenvalues fall fast where residuals at neighbouring points say the same. A Nystrom approximation takes
up the largest; CG finds what is left of the solution, so that the rank decides how long a solve takes, not
what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfdist.optim.option_group import OptionGroup

_SEED = 20210206
"""Of the random vectors: the same on all ranks, in every step and in a resumed run."""


@dataclass(frozen=True, kw_only=True)
class NystromOptions(OptionGroup):
    """sample_space without its matrix."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "sample_rank": (1, 10**6),
        "sample_tolerance": (0.0, 0.1),
        "sample_max_iter": (1, 10**6),
    }

    sample_rank: int | None = None
    """sample_space: solve by CG, preconditioned by a random approximation of JJ' of this rank (Frangella et
    al. 2023), in place of the matrix and its factor; for more residuals than a matrix can have rows. The
    solver auto takes it where residuals and parameters both are too many for a matrix. null: the matrix."""
    sample_tolerance: float = 1e-8
    """Relative residual at which CG is at its end."""
    sample_max_iter: int = 200
    """Most iterations of CG for one lambda."""


class Nystrom:
    """Solves with K + mu I, K symmetric and positive semi-definite.

    The approximation U diag(values) U' is that of Frangella, Tropp & Udell 2023 (arXiv:2110.02820, algorithm
    2.1), with eigenvectors in place of a Cholesky factor, which there is none of where K has fewer directions
    than the rank; the preconditioner that of equation 5.3. One approximation serves every mu.

    Args:
        times: [n] or [n, k] -> K times it; collective.
        like: A vector [n] of K's dtype and device.
        options: `sample_*`.
        on_iteration: Called with the number of every iteration of the first solve.

    Attributes:
        is_finite: Whether products with random vectors were.
        rank: Of the approximation, at most n.
        iterations: Of the last solve.
        residual: |b - (K + mu I)x| / |b| after the last solve, by CG's recurrence.
    """

    def __init__(
        self,
        times: Callable[[Tensor], Tensor],
        like: Tensor,
        options: NystromOptions,
        on_iteration: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._times, self._options, self._on_iteration = times, options, on_iteration
        n = len(like)
        assert options.sample_rank is not None
        self.rank = min(options.sample_rank, n)
        self.iterations, self.residual = 0, 1.0
        generator = torch.Generator().manual_seed(_SEED)
        random = torch.randn(n, self.rank, generator=generator, dtype=torch.float64)
        omega = torch.linalg.qr(random).Q.to(like)
        Y = times(omega)  # [n, r]
        self.is_finite = bool(torch.isfinite(Y).all())
        if self.is_finite:
            self._U, self._values = _approximation(omega, Y)

    @property
    def num_bytes(self) -> int:
        return self._U.nbytes

    def solve(self, mu: float, b: Tensor) -> Tensor:
        """(K + mu I)^-1 b [n], to `sample_tolerance`."""
        x, size = torch.zeros_like(b), float(b.norm())
        if size == 0.0:
            return x
        r, z = b.clone(), self._preconditioned(mu, b)
        p, rz = z, float(torch.dot(b, z))
        first = self.iterations == 0
        self.residual = 1.0
        for number in range(1, self._options.sample_max_iter + 1):
            Ap = self._times(p).add_(p, alpha=mu)
            pAp = float(torch.dot(p, Ap))
            if not pAp > 0.0:  # nothing is left but rounding
                break
            alpha = rz / pAp
            x.add_(p, alpha=alpha)
            r.sub_(Ap, alpha=alpha)
            self.iterations, self.residual = number, float(r.norm()) / size
            if first:
                self._on_iteration(number)
            if self.residual <= self._options.sample_tolerance:
                break
            z = self._preconditioned(mu, r)
            rz, before = float(torch.dot(r, z)), rz
            p = torch.add(z, p, alpha=rz / before)
        return x

    def _preconditioned(self, mu: float, v: Tensor) -> Tensor:
        """((values_r + mu) U (diag(values) + mu)^-1 U' + I - UU') v."""
        values = (self._values + mu).clamp(min=torch.finfo(v.dtype).eps * float(self._values[0]))
        return v + self._U @ ((values[-1] / values - 1.0) * (self._U.T @ v))


def _approximation(omega: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """U [n, r'], values [r'], falling, of Y (omega'Y)^-1 Y' with Y = K omega; omega [n, r] orthonormal."""
    eps = torch.finfo(Y.dtype).eps
    shift = eps * float(Y.norm())
    Y = torch.add(Y, omega, alpha=shift)
    inner = omega.T @ Y
    d, V = torch.linalg.eigh(0.5 * (inner + inner.T))
    kept = d > max(shift, float(d.abs().max()) * eps)
    if not bool(kept.any()):  # K is zero
        kept = d == d.max()
    B = Y @ (V[:, kept] * d[kept].clamp(min=torch.finfo(d.dtype).tiny).rsqrt())
    U, singular, _ = torch.linalg.svd(B, full_matrices=False)
    return U, (singular.square() - shift).clamp(min=0.0)
