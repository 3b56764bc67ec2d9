"""Solvers of a step's model, one a file, and the table that names them.

A new one is a file with a function `(System, options) -> Solution`, a line in `SOLVERS`, its name in
`SolverOptions.solver`, and its own options beside it; the conformance test runs over the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hfdist.optim.least_squares import LeastSquaresOptions
from hfdist.optim.solvers import auto, cg, dense, krylov, metric, nystrom, sample_space, steihaug
from hfdist.optim.solvers.solution import Candidate, Solution, System

__all__ = ["SOLVERS", "Candidate", "Solution", "Solver", "SolverOptions", "System"]

Solver = Callable[[System, Any], Solution]
"""The second argument is the whole of the options; a solver reads its own."""

SOLVERS: dict[str, Solver] = {
    "krylov": krylov.solve,
    "cg": cg.solve,
    "steihaug": steihaug.solve,
    "dense": dense.solve,
    "sample_space": sample_space.solve,
    "auto": auto.solve,
    "metric": metric.solve,
}
"""The solvers by their names in `solver`."""


@dataclass(frozen=True, kw_only=True)
class SolverOptions(
    krylov.KrylovOptions, cg.CGOptions, nystrom.NystromOptions, LeastSquaresOptions
):
    """Which solver, and every solver's options."""

    solver: Literal["auto", "krylov", "cg", "steihaug", "metric", "dense", "sample_space"] = "auto"
    """krylov: a short Krylov space in which damping is chosen after the solve; cg: conjugate gradients [2];
    steihaug: the same with a trust region in place of damping, of radius |gradient| / lambda [8]; metric: the
    preconditioned gradient without products, cheap on small batches; dense: the whole matrix, of thousands of
    parameters at most; sample_space: for residuals, the system in their space, for fewer residuals than
    parameters. auto: of residuals (a ResidualTask's, or those of a loss of squares: `Task.sum_of_squares`),
    the cheapest of dense, sample_space and krylov by their sizes; otherwise krylov."""
