"""What a step returns: values for the caller to log, save or show."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field


class Stop(enum.StrEnum):
    """Why the solver ended."""

    PROGRESS = "progress"
    RESIDUAL = "residual"
    MAX_ITERATIONS = "max_iterations"
    NONPOSITIVE_CURVATURE = "nonpositive_curvature"
    NON_FINITE = "non_finite"
    ZERO_GRADIENT = "zero_gradient"
    EXACT_START = "exact_start"
    BOUNDARY = "boundary"
    SECANTS = "secants"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One Hessian-free step in numbers. Losses are global means (or sums), regularisation included."""

    step: int
    """Number of the step, from 0."""
    loss: float
    """Loss before the step, on the gradient batch."""
    final_loss: float
    """Loss after the step, on the line-search batch; the loss before it if the step was rejected."""
    accepted: bool
    """Whether the parameters moved."""
    alpha: float
    """Step size; 0 if rejected."""
    damping: float
    """Damping that this step used."""
    next_damping: float
    """Damping that the next step will use."""
    reduction_ratio: float
    """The ratio that adapted the damping; NaN if there was none."""
    reduction_ratio_undamped: float
    """Actual over predicted change of the loss, by the model without the damping term [2, sec. 8.5]."""
    reduction_ratio_damped: float
    """The same by the model with it."""
    cg_iterations: int
    """Iterations of the solver."""
    chosen_iterate: int
    """Iteration that the step belongs to."""
    stop: Stop
    """Why the solver ended."""
    residual: float
    """|b - Ax| / |b| at CG's end."""
    grad_norm: float
    """|g|, over the whole vector."""
    update_norm: float
    """alpha |delta|."""
    directional_derivative: float
    """Gradient times the chosen step, before the line search scales it."""
    num_products: int
    """Products with the curvature matrix."""
    num_loss_evaluations: int
    """Candidate evaluations (backtracking and line search together)."""
    product_engine: str = ""
    """How curvature products were computed (see `HFOptions.product_engine`)."""
    curvature_ratio: float = math.nan
    """Curvature along the last step on this step's curvature examples, over that on the last one's."""
    curvature_share: float = 1.0
    """Examples of the products, as a share of the gradient's."""
    kept_gain: float = math.nan
    """Part of what recent steps gained on their own examples that the next ones' still show: 1 where they
    are the same, near 0 where batches are too small; NaN in the first steps."""
    finds_noise: bool = False
    """Whether that has just become too small (see `hfdist.optim.kept_gain`); once in a run."""
    work: float = 0.0
    """Work of the step, in gradients of its gradient batch (see `hfdist.optim.objective.Costs`)."""
    solver_bytes: int = 0
    """Memory of the solver's vectors on this rank: right-hand side, CG's own, kept iterates, start."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase: gradient, cg, backtracking, line_search, total."""
    quadratic: tuple[float, ...] = ()
    """Damped quadratic model after each CG iteration, from its start: the CG curve."""
    candidates: tuple[tuple[int, float], ...] = ()
    """(CG iteration, loss) of every iterate that backtracking evaluated."""
    communication: dict[str, float] = field(default_factory=dict)
    """Collective calls, bytes and seconds of the step."""

    def metrics(self) -> dict[str, float]:
        """Numbers a step, by the names under which they are recorded; non-finite ones are left out."""
        values = {
            "loss": self.loss,
            "final_loss": self.final_loss,
            "accepted": float(self.accepted),
            "alpha": self.alpha,
            "damping": self.damping,
            "reduction_ratio": self.reduction_ratio,
            "reduction_ratio_undamped": self.reduction_ratio_undamped,
            "reduction_ratio_damped": self.reduction_ratio_damped,
            "cg_iterations": float(self.cg_iterations),
            "chosen_iterate": float(self.chosen_iterate),
            "stop_reason": float(list(Stop).index(self.stop)),  # its place in `Stop`
            "residual": self.residual,
            "grad_norm": self.grad_norm,
            "update_norm": self.update_norm,
            "solver_bytes": float(self.solver_bytes),
            "products": float(self.num_products),
            "work": self.work,
            "curvature_ratio": self.curvature_ratio,
            "curvature_share": self.curvature_share,
            "kept_gain": self.kept_gain,
            "loss_evaluations": float(self.num_loss_evaluations),
            **{f"seconds/{phase}": value for phase, value in self.seconds.items()},
            **{f"communication/{key}": value for key, value in self.communication.items()},
        }
        return {key: value for key, value in values.items() if math.isfinite(value)}
