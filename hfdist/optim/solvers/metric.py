"""The preconditioned gradient alone: no product with the curvature, only the metric's own model of it.

In a model whose curvature is lambda C, for the metric C, the step is C^-1 b / lambda. The candidates are
those of several lambda; their true losses decide, and lambda follows. A K-FAC step without its re-scaling
(Martens & Grosse 2015, sec. 6.4), which costs products.
"""

from __future__ import annotations

import math
from typing import Any

from hfdist.optim.report import Stop
from hfdist.optim.solvers.krylov import FACTOR
from hfdist.optim.solvers.solution import Candidate, Solution, System

RUNGS = 8
"""Candidates on each side of the step's lambda."""


def solve(system: System, options: Any) -> Solution:
    """Steps C^-1 b / lambda for falling lambda, FACTOR apart; lambda = 1 trusts the metric.

    Args:
        system: `preconditioner(None)` gives C^-1; None stands for C = I. Products and start are not used.
        options: None of its keys.
    """
    M = system.preconditioner(None)
    u = system.b.clone() if M is None else M(system.b).clone()  # [n], this rank's part
    squared, slope = system.space.dots((u, u), (u, system.b))  # slope = b'C^-1 b
    stop, moves = Stop.MAX_ITERATIONS, True
    if not math.isfinite(squared) or not slope > 0.0:
        # Nowhere to go, or a metric that is none.
        stop = Stop.ZERO_GRADIENT if squared == 0.0 else Stop.NON_FINITE
        u.zero_()
        slope, moves = 0.0, False
    rungs = range(RUNGS, -RUNGS - 1, -1) if system.damping > 0.0 else (0,)
    dampings = [system.damping * FACTOR**rung for rung in rungs]
    lengths = [1.0 / damping if damping > 0.0 else 1.0 for damping in dampings]
    candidates = [
        Candidate(
            iteration=int(moves),
            model=-0.5 * t * slope,
            damping=damping,
            undamped_model=-t * slope + 0.5 * t * t * slope,
        )
        for damping, t in zip(dampings, lengths)
    ]
    if moves and system.on_iteration is not None:
        system.on_iteration(1, float(system.space.read_signal(u)))
    centre = len(dampings) // 2
    return Solution(
        candidates=candidates,
        step=lambda index: u * lengths[index],
        is_path=False,
        centre=centre,
        next_start=None,
        quadratic=[0.0, candidates[centre].model][: 1 + moves],
        iterations=int(moves),
        stop=stop,
        residual=abs(1.0 - lengths[centre]),
        num_products=0,
        num_bytes=2 * u.nbytes,
    )
