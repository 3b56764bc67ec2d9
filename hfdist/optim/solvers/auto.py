"""The solver for a problem by its sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hfdist.optim.solvers import dense, krylov, sample_space
from hfdist.optim.solvers.solution import Solution, System

LARGEST = 6000
"""Rows of a matrix that is factorised in every step: 36 million numbers, and seconds on one core."""


def solve(system: System, options: Any) -> Solution:
    """By `choice`."""
    ls = system.least_squares
    num_residuals = None if ls is None or system.space.is_sharded else ls.num_residuals
    name = choice(num_residuals, system.space.numel(system.b))
    is_even = ls is not None and not isinstance(ls.weight_decay, Tensor)
    if name == "sample_space" and (system.damping_scale is not None or not is_even):
        name = "krylov"  # it takes one lambda and one L2 coefficient for all parameters
    solvers: dict[str, Callable[[System, Any], Solution]] = {
        "krylov": krylov.solve,
        "dense": dense.solve,
        "sample_space": sample_space.solve,
    }
    return solvers[name](system, options)


def choice(num_residuals: int | None, num_parameters: int) -> str:
    """dense costs N P^2 multiplications for its matrix and P^3 / 3 for a factor; sample_space N^2 P and N^3 /
    3. Where the smaller of N and P is too large for a matrix, or there are no residuals: krylov."""
    N, P = num_residuals, num_parameters
    if N is None or min(N, P) > LARGEST:
        return "krylov"
    costs = {"dense": N * P**2 + P**3 / 3, "sample_space": N**2 * P + N**3 / 3}
    name = min(costs, key=costs.__getitem__)
    return name if (P if name == "dense" else N) <= LARGEST else "krylov"
