"""Hessian-free beside first-order and quasi-Newton optimizers on whole batches, by work, seconds and updates.

Every contender starts from the same parameters and sees the same batch. Each rival gets the best of a grid
at every loss; Hessian-free gets its defaults.
"""

from hfdist.bench.optimizers.arena import Budget
from hfdist.bench.optimizers.pictures import plot
from hfdist.bench.optimizers.problems import COMPARISONS, named
from hfdist.bench.optimizers.study import Study, compare
from hfdist.bench.optimizers.tables import own_ratios, rows

__all__ = ["COMPARISONS", "Budget", "Study", "compare", "named", "own_ratios", "plot", "rows"]
