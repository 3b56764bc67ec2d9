"""Hessian-free beside Adam, L-BFGS and SOAP on differential equations with known solutions: relative errors
in L2 by seconds.

Every contender starts from the same parameters, sees the same points in the same steps, and has the same
seconds. Each rival has the best of a grid; Hessian-free its defaults.
"""

from hfdist.bench.pinns.pictures import plot
from hfdist.bench.pinns.problems import PROBLEMS, named
from hfdist.bench.pinns.study import Study, compare
from hfdist.bench.pinns.tables import markdown, rows

__all__ = ["PROBLEMS", "Study", "compare", "markdown", "named", "plot", "rows"]
