"""Solvers of a step's model, one a file, and the table that names them.

A new one is a file with a function `(System, options) -> Solution`, a line in `SOLVERS`, its name in
`SolverOptions.solver`, and its own options beside it; the conformance test runs over the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hfdist.optim.solvers import cg, krylov, metric, steihaug
from hfdist.optim.solvers.solution import Candidate, Solution, System

__all__ = ["SOLVERS", "Candidate", "Solution", "Solver", "SolverOptions", "System"]

Solver = Callable[[System, Any], Solution]
"""The second argument is the whole of the options; a solver reads its own."""

SOLVERS: dict[str, Solver] = {
    "krylov": krylov.solve,
    "cg": cg.solve,
    "steihaug": steihaug.solve,
    "metric": metric.solve,
}
"""The solvers by their names in `solver`."""


@dataclass(frozen=True, kw_only=True)
class SolverOptions(krylov.KrylovOptions, cg.CGOptions):
    """Which solver, and every solver's options."""

    solver: Literal["krylov", "cg", "steihaug", "metric"] = "krylov"
    """A short Krylov space in which damping is chosen after the solve; conjugate gradients [2]; or the same
    with a trust region in place of damping, of radius |gradient| / lambda [8]; or metric: the
    preconditioned gradient without products, cheap on small batches."""
