"""Randomised Nystrom approximation of rank r, Frangella, Tropp & Udell 2023, algorithms 2.1 and 5.1."""

from __future__ import annotations

import torch
from torch import Tensor

from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.devices import sent
from hfdist.optim.objective import Operator


class LowRankInverse:
    """v -> U diag(1/(values + shift)) U'v + (v - UU'v) / (rest + shift).

    Args:
        U: Orthonormal columns, this rank's part [n, r].
        values: Of the directions in U, positive, float64 [r].
        rest: Of all others, positive.
        problem: Adds up dot products of parts.
    """

    def __init__(self, U: Tensor, values: Tensor, rest: float, problem: Problem) -> None:
        self._U, self._problem, self._rest = U, problem, 1.0 / rest
        self._extra = (values.reciprocal() - 1.0 / rest).to(U.dtype)

    def __call__(self, v: Tensor) -> Tensor:
        inside = self._problem.total((self._U.T @ v).double()).to(v.dtype)
        return v * self._rest + self._U @ (self._extra * inside)


def nystrom(context: Context) -> Builder:
    """The inverse of U diag(values) U' + least (I - UU') + shift I: what was not seen has the least of the
    values that were."""
    rank = context.options.nystrom_rank
    taken: list[tuple[Tensor, Tensor]] = []  # once a step, whatever its dampings

    def build(problem: Problem, damping: float | None) -> Operator | None:
        if not taken:
            taken.append(approximation(problem, min(rank, problem.numel)))
        U, values = taken[0]
        if not bool(values.isfinite().all()) or float(values[0]) <= 0.0:
            return None
        least = max(float(values[-1]), 1e-6 * float(values[0]))
        shift = _mean(problem.shift_part(damping or 0.0), problem)
        return LowRankInverse(U, values.clamp(min=least) + shift, least + shift, problem)

    return build


def approximation(problem: Problem, rank: int) -> tuple[Tensor, Tensor]:
    """(U [n, r], values [r], descending, float64) from `rank` products with random vectors. Collective."""
    B = problem.curvature()
    omega, Y = [], []
    for k in range(rank):
        v = problem.part_of(_normal(problem, k))
        omega.append(v)
        Y.append(B(v) - problem.shift_part() * v)
    problem.count_products(rank)
    W, Z = torch.stack(omega, 1), torch.stack(Y, 1)  # [n, r]
    size = float(problem.total(Z.double().square().sum()).sqrt())
    shift = torch.finfo(Z.dtype).eps * size
    Z = Z.add_(W, alpha=shift)
    inner = problem.total(W.double().T @ Z.double())
    L, info = torch.linalg.cholesky_ex((inner + inner.T) / 2)
    if bool(info) or not bool(L.isfinite().all()):  # negative curvature, or none: by eigenvectors
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        kept = values > 1e-10 * values.abs().max().clamp(min=1e-300)
        root = vectors[:, kept] * values[kept].rsqrt()
    else:
        root = torch.linalg.inv(L).T
    F = Z @ root.to(Z.dtype)  # FF' is the approximation
    gram = problem.total(F.double().T @ F.double())
    values, V = torch.linalg.eigh((gram + gram.T) / 2)
    order = values.argsort(descending=True)
    values, V = values[order], V[:, order]
    kept = values > 1e-12 * values[:1].clamp(min=1e-300)
    values, V = values[kept], V[:, kept]
    U = F @ (V * values.rsqrt()).to(F.dtype)
    return U, (values - shift).clamp(min=0.0)


def _normal(problem: Problem, number: int) -> Tensor:
    """A random vector [P], the same on all ranks."""
    generator = torch.Generator().manual_seed(number)
    vector = torch.randn(problem.numel, generator=generator)
    return sent(vector, problem.params.device, problem.params.dtype)


def _mean(shift: float | Tensor, problem: Problem) -> float:
    if not isinstance(shift, Tensor):
        return shift
    return float(problem.total(shift.double().sum())) / problem.numel
