"""The whole curvature matrix, written out and factorised once a step: for thousands of parameters at most."""

from __future__ import annotations

import torch
from torch import Tensor

from hfdist.optim.least_squares import LeastSquaresOptions
from hfdist.optim.report import Stop
from hfdist.optim.solvers.shifted import Shifted
from hfdist.optim.solvers.solution import Solution, System
from hfdist.optim.solvers.trials import Model, Trials


def solve(system: System, options: LeastSquaresOptions) -> Solution:
    """(B + lambda D) x = b for one lambda after the other.

    B is J'J of the residuals, or without residuals made of P products. Where it is not positive definite,
    its eigenvalues count by their sizes.

    Raises:
        ValueError: Vectors lie in parts on the ranks, or D has a zero.
    """
    if system.space.is_sharded:
        raise ValueError("solver=dense holds whole matrices: it needs shard_solver_state=false")
    b, ls = system.b, system.least_squares
    iterations = 1 if ls is not None else b.numel()
    if not bool(b.any()):
        return nothing(system, Stop.ZERO_GRADIENT)
    B = _by_products(system) if ls is None else _of_residuals(system)
    if B is None:
        return nothing(system, Stop.NON_FINITE)
    D = system.damping_scale
    if D is not None and not bool((D > 0).all()):
        raise ValueError("damping_scale is 0 in a parameter group: solver=dense needs it above 0")
    root = None if D is None else D.sqrt()
    shifted = Shifted(B if root is None else B / torch.outer(root, root))

    def solved(damping: float, w: Tensor) -> Tensor:
        if root is None:
            return shifted.solve(damping, w)
        return shifted.solve(damping, w / root) / root

    def models(v: Tensor) -> Model:
        m = 0.5 * torch.dot(v, B @ v) - torch.dot(b, v)
        return Model(m=float(m), vDv=float(torch.dot(v, v if D is None else D * v)))

    trials = Trials(
        damping=system.damping,
        iteration=iterations,
        solve=lambda damping: solved(damping, b),
        models=models,
        options=options,
        least_squares=ls,
        bent=None if ls is None else lambda damping, w: solved(damping, ls.transposed_times(w)),
    )
    if ls is not None and system.on_iteration is not None:
        system.on_iteration(1, float(system.space.read_signal(b)))
    first = trials[0]
    return Solution(
        candidates=trials,
        step=trials.step,
        is_path=False,
        takes_first=True,
        falling=trials.falling,
        next_start=None,
        quadratic=[0.0, first.model],
        iterations=iterations,
        stop=Stop.RESIDUAL,
        residual=0.0,
        num_products=0 if ls is not None else iterations,
        num_bytes=2 * B.nbytes + 4 * b.nbytes,
    )


def _of_residuals(system: System) -> Tensor | None:
    ls = system.least_squares
    assert ls is not None
    B = ls.gram()
    if not bool(torch.isfinite(B).all()):
        return None
    B.diagonal().add_(ls.weight_decay)
    return B


def _by_products(system: System) -> Tensor | None:
    """Column by column."""
    A, b = system.curvature(0.0), system.b
    B = torch.empty(b.numel(), b.numel(), dtype=b.dtype, device=b.device)
    e = torch.zeros_like(b)
    for k in range(b.numel()):
        e[k] = 1.0
        B[k] = A(e)
        e[k] = 0.0
        if not bool(torch.isfinite(B[k]).all()):
            return None
        if system.on_iteration is not None:
            system.on_iteration(k + 1, float(system.space.read_signal(b)))
    return 0.5 * (B + B.T)


def nothing(system: System, stop: Stop) -> Solution:
    """No step."""
    b = system.b
    trials = Trials(
        damping=0.0,
        iteration=0,
        solve=lambda damping: torch.zeros_like(b),
        models=lambda v: Model(m=0.0, vDv=0.0),
        options=LeastSquaresOptions(),
    )
    return Solution(
        candidates=trials,
        step=trials.step,
        is_path=False,
        takes_first=True,
        next_start=None,
        quadratic=[0.0],
        iterations=0,
        stop=stop,
        residual=0.0 if stop is Stop.ZERO_GRADIENT else 1.0,
        num_products=0,
        num_bytes=b.nbytes,
    )
