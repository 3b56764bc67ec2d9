"""The solver for a problem by its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    P = system.space.numel(system.b)
    name = choice(num_residuals, P, options.sample_rank)
    if options.structural_damping:
        name = "krylov"  # the others have rows of the residuals alone
    is_even = ls is not None and not isinstance(ls.weight_decay, Tensor)
    if name == "sample_space" and (system.damping_scale is not None or not is_even):
        name = "krylov"  # it takes one lambda and one L2 coefficient for all parameters
    if name == "sample_space" and num_residuals is not None and num_residuals <= LARGEST:
        options = replace(options, sample_rank=None)  # its matrix is no burden
    solvers: dict[str, Callable[[System, Any], Solution]] = {
        "krylov": krylov.solve,
        "dense": dense.solve,
        "sample_space": sample_space.solve,
    }
    return solvers[name](system, options)


def choice(
    num_residuals: int | None,
    num_parameters: int,
    sample_rank: int | None = None,
    largest: int = LARGEST,
) -> str:
    """dense costs N P^2 multiplications for its matrix and P^3 / 3 for a factor; sample_space N^2 P and N^3 /
    3. Where the smaller of N and P is too large for a matrix, or there are no residuals: krylov, or
    sample_space of a given rank."""
    N, P = num_residuals, num_parameters
    without = "krylov" if N is None or sample_rank is None else "sample_space"
    if N is None or min(N, P) > largest:
        return without
    costs = {"dense": N * P**2 + P**3 / 3, "sample_space": N**2 * P + N**3 / 3}
    name = min(costs, key=costs.__getitem__)
    return name if (P if name == "dense" else N) <= largest else without
