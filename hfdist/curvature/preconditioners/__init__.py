"""Preconditioners of CG, one a file, and the table that names them.

A new one is a file with a function `Context -> Builder`, a line in `PRECONDITIONERS`, its name in
`PreconditionerOptions.preconditioner`, and its own options beside that; the conformance test runs over the
table.
"""

from __future__ import annotations

from collections.abc import Callable

from hfdist.curvature.preconditioners import of_task
from hfdist.curvature.preconditioners.auto import auto
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.curvature.preconditioners.diagonal import DiagonalPreconditioner
from hfdist.curvature.preconditioners.ekfac import ekfac
from hfdist.curvature.preconditioners.empirical_fisher import (
    empirical_fisher_diagonal,
    sum_of_squared_gradients,
)
from hfdist.curvature.preconditioners.ggn_diagonal import ggn_diagonal
from hfdist.curvature.preconditioners.kfac import kfac
from hfdist.curvature.preconditioners.lbfgs import lbfgs
from hfdist.curvature.preconditioners.nystrom import nystrom

__all__ = [
    "PRECONDITIONERS",
    "Builder",
    "Context",
    "DiagonalPreconditioner",
    "empirical_fisher_diagonal",
    "make_preconditioner",
    "sum_of_squared_gradients",
]

PRECONDITIONERS: dict[str, Callable[[Context], Builder | None]] = {
    "none": lambda context: None,
    "empirical_fisher": of_task.empirical_fisher,
    "auto": auto,
    "kfac": kfac,
    "ekfac": ekfac,
    "ggn_diagonal": ggn_diagonal,
    "nystrom": nystrom,
    "lbfgs": lbfgs,
}
"""The preconditioners by their names in `preconditioner`."""


def make_preconditioner(context: Context) -> Builder | None:
    """The one that the options name, for `Overrides.preconditioner`; None for none."""
    return PRECONDITIONERS[context.options.preconditioner](context)
