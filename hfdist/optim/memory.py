"""How much memory the solver of a step takes: the formula that the guide states."""

from __future__ import annotations

import math

from hfdist.optim.options import HFOptions
from hfdist.optim.solvers.basis import ROWS, WINDOW
from hfdist.optim.solvers.krylov import SHIFT_RUNGS, takes_secants

WORKING = 8
"""Vectors that a solve works on: gradient, right-hand side, product, iterate, residual, direction, what a
preconditioner returns, and the last step; the line search has no more."""
_METRIC = 5
_OF_A_NUMBER = {"full": 1.0, "host": 0.0}


def solver_vectors(options: HFOptions, numel: int, itemsize: int = 4) -> float:
    """Most vectors [numel] that a solve holds at a time on its device.

    Args:
        options: The step's.
        numel: Number of parameters, or of a rank's share of them.
        itemsize: Bytes of a number of these vectors.

    Returns:
        cg: 8, and the iterates of the backtracking grid up to `cg_max_iter`. krylov: 8, two for every
        dimension of the space, 4 at a time, and with a whole basis two for every pair of `secant_pairs` and
        the last gradient; without a basis 30, or 24 without momentum. steihaug: 8.
        metric: 5. dense: 8, and two matrices.
        sample_space: 8; its matrices are as large as the residuals are many, and not in this number.
    """
    kept_as = options.krylov_basis if options.solver in ("auto", "krylov") else options.cg_iterates
    size = _OF_A_NUMBER.get(kept_as, 2.0 / itemsize)
    if options.solver in ("auto", "krylov"):
        if kept_as == "none":
            joins = options.krylov_momentum
            return WORKING + 2 * WINDOW + (2 + joins) * (2 * SHIFT_RUNGS + 1) + joins
        dim = min(options.krylov_max_dim, numel)
        kept = 2 * options.secant_pairs + 1 if takes_secants(options) else 0
        return WORKING + 2 * size * ROWS * -(-dim // ROWS) + kept
    if options.solver == "cg":
        longest = numel if options.cg_max_iter is None else min(options.cg_max_iter, numel)
        keeps = options.use_cg_backtracking or options.reduction_ratio_at == "last"
        return WORKING + (size * kept_iterates(options.cg_grid_gamma, longest) if keeps else 0)
    if options.solver == "dense":
        return WORKING + 2.0 * numel
    return _METRIC if options.solver == "metric" else WORKING


def kept_iterates(gamma: float, longest: int) -> int:
    """Number of iterations from 0 to `longest` that are on the backtracking grid, ceil(gamma^j) - 1."""
    found, place = {0}, 1.0
    while math.ceil(place) - 1 <= longest:
        found.add(math.ceil(place) - 1)
        place *= gamma
    return len(found)
