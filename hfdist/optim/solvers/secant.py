"""A step without products, from the changes of the gradient along the last steps (see `optim.secants`)."""

from __future__ import annotations

import math

from hfdist.optim.report import Stop
from hfdist.optim.solvers.solution import Candidate, Solution, System

SHORTER = tuple(4.0**-k for k in range(7))
"""Parts of the step that are tried, one after the other, until one lowers the loss."""


def solve(system: System) -> Solution:
    """The step of the pairs that were kept; `system.secants` leads.

    Candidates are parts of it. lambda is that of the solves, and stays as it is.
    """
    secants = system.secants
    assert secants is not None
    x, slope = secants.direction(system.preconditioner(None), system.space)  # slope = b'x
    stop, parts = Stop.SECANTS, SHORTER
    if not math.isfinite(slope) or slope <= 0.0:
        x.zero_()
        stop, parts, slope = Stop.NON_FINITE, (0.0,), 0.0
    if system.on_iteration is not None:
        system.on_iteration(1, float(system.space.read_signal(x)))
    models = [(-t + 0.5 * t * t) * slope for t in parts]
    return Solution(
        candidates=[
            Candidate(iteration=int(slope > 0.0), model=m, damping=system.damping, undamped_model=m)
            for m in models
        ],
        step=lambda index: x * parts[index],
        is_path=False,
        takes_first=True,
        next_start=None,
        starts_from_step=True,
        quadratic=[0.0, -0.5 * slope],
        iterations=1,
        stop=stop,
        residual=0.0,
        num_products=0,
        num_bytes=2 * x.nbytes,
        secants=secants,
        is_of_secants=True,
    )
