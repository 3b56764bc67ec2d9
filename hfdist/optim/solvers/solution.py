"""What a solver is given, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hfdist.optim.least_squares import LeastSquares
from hfdist.optim.objective import Costs, Operator
from hfdist.optim.report import Stop
from hfdist.optim.secants import Secants
from hfdist.optim.space import WHOLE, Space


@dataclass(frozen=True, kw_only=True)
class System:
    """The step's model m(x) = x'Bx/2 - b'x, to be minimised approximately and with damping."""

    curvature: Callable[[float], Operator]
    """lambda -> v -> (B + lambda (D + mu S)) v, D the damping metric, mu S structural damping."""
    exact_curvature: Callable[[float], Operator]
    """The same with less rounding; may share memory with it."""
    b: Tensor
    """Minus the gradient [n]; finite."""
    damping: float
    """lambda."""
    loss: float = math.nan
    """Before the step."""
    secants: Secants | None = None
    """What earlier steps showed of the curvature; None: nobody keeps it."""
    preconditioner: Callable[[float | None], Operator | None] = lambda damping: None
    """lambda -> M, an approximation of the inverse of B + lambda D; None -> the inverse of a metric, an
    approximation of B alone. The identity where it gives None."""
    see: Callable[[], Callable[[Tensor, Tensor, Tensor], None] | None] = lambda: None
    """Who is told of u, Bu and Cu of every direction of a space in the metric C, once `preconditioner` was
    called; None: nobody."""
    start: Tensor | None = None
    """What the last solution left for this one [n] (see `Solution.next_start`); None is zero."""
    keep_path: bool = True
    """Candidates on the way are wanted, not only the last."""
    damping_scale: Tensor | None = None
    """Diagonal of D [n]; None is the identity."""
    structural: Callable[[], Operator | None] = lambda: None
    """S, once `curvature` was called; None where there is no structural damping."""
    least_squares: LeastSquares | None = None
    """Where the objective is a sum of squares: its residuals."""
    space: Space = WHOLE
    """How vectors lie over ranks."""
    costs: Callable[[], Costs] = Costs
    """What the parts of a step cost, once `curvature` was called."""
    on_iteration: Callable[[int, float], None] | None = None
    """Called with the number of each finished iteration and the space's signal; what it raises
    propagates."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A step that the solver offers."""

    iteration: int
    """Number of the iteration that it belongs to."""
    model: float
    """m(x) + damping/2 x'Dx."""
    damping: float
    """lambda in `model`."""
    undamped_model: float | None = None
    """m(x), where the solver has it; computed from `model` otherwise."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Outcome of a solve, whatever the solver."""

    candidates: Sequence[Candidate]
    """At least one, in the order of the iterations, or of falling lambda."""
    step: Callable[[int], Tensor]
    """Index of a candidate -> its x [n]."""
    is_path: bool
    """Whether the candidates lie on the way of one iteration, for backtracking; otherwise they are those of
    falling lambda, and the search climbs from `centre`."""
    next_start: Tensor | None
    """What the next step may start from [n]; None where the solver starts from zero."""
    quadratic: Sequence[float]
    """The damped model after 0, 1, .. iterations."""
    iterations: int
    stop: Stop
    residual: float
    """|b - Ax| / |b| at the end."""
    num_products: int
    num_bytes: int
    """Memory of the solver's vectors on this rank's device."""
    takes_first: bool = False
    """Candidates are tried in their order until one has a lower loss than no step; each is computed when it
    is asked for."""
    falling: Sequence[int] = ()
    """The last of them, of lambda ever smaller than the first one's: tried in their order while the loss
    falls, where the first one helps and nothing is known of the right lambda."""
    starts_from_step: bool = False
    """The next solve is given the step that is taken, in place of `next_start`."""
    centre: int = 0
    """Where there is no path: the candidate of the step's own lambda."""
    start_curvature: float | None = None
    """d'Bd of the last step d, where it was computed."""
    secants: Secants | None = None
    """Who is told what the step came to."""
    is_of_secants: bool = False
    """The step says nothing of lambda or of the curvature's examples: both stay as they are."""
