"""Every rule of a Hessian-free step that can be chosen: the `optim.*` keys of a job file.

The names of PyTorchHessianFree's constructor arguments are kept, so that its users find them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

PRESETS: dict[str, dict[str, Any]] = {
    # What the literature does; the defaults below.
    "default": {},
    # PyTorchHessianFree's rules, for migration and comparison.
    "seed": {
        "cg_stop": "relative_progress",
        "nonpositive_curvature": "ignore",
        "reduction_ratio": "damped",
        "reduction_ratio_at": "last",
        "linesearch_max_iter": 20,
        "reset_warm_start": False,
        "raise_damping_on_reject": False,
        "damping_max": math.inf,
    },
}


@dataclass(frozen=True, kw_only=True)
class HFOptions:
    """Rules and constants of one Hessian-free step. Sources: see `hfdist.optim`.

    Raises:
        ValueError: A value is out of its range; the message names the key and the range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    preset: Literal["default", "seed"] = "default"
    """Base set of rules that the other keys change: the literature's, or PyTorchHessianFree's."""

    curvature_opt: Literal["ggn", "hessian"] = "ggn"
    """Curvature matrix of the quadratic model: generalized Gauss-Newton, or the Hessian."""

    # Damping: A = B + damping * I
    damping: float = 1.0
    """Initial Tikhonov damping lambda >= 0 [1, sec. 4.1]; 0 switches damping off for good."""
    adapt_damping: bool = True
    """Adapt lambda by the Levenberg-Marquardt rule [1, sec. 4.1]."""
    damping_min: float = 1e-12
    """Lower bound of the adapted lambda."""
    damping_max: float = 1e12
    """Upper bound of the adapted lambda."""
    damping_increase: float = 3 / 2
    """Factor on lambda when the reduction ratio is below `reduction_ratio_low`, or not finite."""
    damping_decrease: float = 2 / 3
    """Factor on lambda when the reduction ratio is above `reduction_ratio_high`."""
    reduction_ratio_low: float = 0.25
    """Reduction ratio under which the model is not trusted."""
    reduction_ratio_high: float = 0.75
    """Reduction ratio over which the model is trusted further."""
    reduction_ratio: Literal["undamped", "damped"] = "undamped"
    """Quadratic model in the ratio's denominator: without the damping term [2, sec. 8.5], or with."""
    reduction_ratio_at: Literal["chosen", "last"] = "chosen"
    """Step the ratio is taken at: the backtracked one from 0, or from CG's start to its last iterate."""
    raise_damping_on_reject: bool = True
    """Raise lambda after a rejected step, whatever the reduction ratio says."""
    weight_decay: float = 0.0
    """L2 coefficient: adds weight_decay/2 |theta|^2 to the loss, in value, gradient and product."""

    # Conjugate gradients
    cg_max_iter: int | None = 250
    """Most CG iterations a step [2, sec. 8.7]; null: the number of parameters."""
    cg_decay_x0: float = 0.95
    """CG starts from this times the last step's CG solution [2, sec. 10]; 0 starts from zero."""
    cg_decay_x0_max: float | None = None
    """If given, the decay rises linearly to this value [9, A.6] ..."""
    cg_decay_x0_steps: int = 1000
    """... over this many steps."""
    reset_warm_start: bool = True
    """Start CG from zero after a rejected step."""
    cg_stop: Literal["martens", "relative_progress", "residual"] = "martens"
    """Stopping rule: per-iteration progress [1, sec. 4.4], the seed's variant, or the residual alone."""
    cg_stop_eps: float = 5e-4
    """Progress of the quadratic under which CG stops."""
    cg_stop_window: int = 10
    """Progress is measured over max(this, i/10) iterations [1, sec. 4.4]."""
    cg_tol: float = 1e-5
    """CG stops once |r| <= max(cg_tol |b|, cg_atol)."""
    cg_atol: float = 0.0
    """See cg_tol."""
    cg_residual_replacement: int | None = None
    """Compute the residual anew, as Ax - b, every so many iterations, at the price of a product: rounding
    (of `reduction_dtype`, or of long solves in float32) no longer piles up in it."""
    nonpositive_curvature: Literal["stop", "use", "absolute", "ignore"] = "stop"
    """When p'Ap <= 0: keep the iterate so far; move along p (a descent direction) and stop; go on with
    |p'Ap| (saddle-free); or go on as if nothing happened (the seed)."""
    cg_grid_gamma: float = 1.3
    """Iterates ceil(gamma^j) - 1 are kept for backtracking [1, sec. 4.6]."""
    cg_iterates: Literal["full", "bfloat16", "host"] = "full"
    """How they are kept: as they are, rounded to bfloat16 (the step taken is the rounded one, whose loss
    was evaluated), or in the host's memory."""

    shard_solver_state: bool = False
    """Hold 1/W of every CG vector and kept iterate on each of W ranks, instead of all of them."""
    reduction_dtype: Literal["full", "bfloat16"] = "full"
    """Sum products over ranks as they are, or rounded to bfloat16, which halves float32's traffic; give
    `cg_residual_replacement`, too, whose products are summed as they are. Gradients always are."""

    # Curvature products
    product_engine: Literal["linearize", "double_backward", "recompute"] = "linearize"
    """How products are computed: by replaying the forward pass on tangents (double backward where that
    is impossible), by double backward, or without keeping anything between products (least memory)."""
    verify: Literal["first", "always", "off"] = "first"
    """Check gradient and products of one microbatch against differences of losses and outputs: on the first
    solve, and when other operations are replayed than before; on every solve; or never. A product engine
    that is wrong is replaced, and a gradient that is wrong is an error."""
    memory_budget: int | None = None
    """Bytes for the graphs that are kept between products; microbatches beyond it are recomputed for
    every product, with the same result. null: what the device has left."""
    product_autocast: Literal["off", "bfloat16"] = "off"
    """Compute the forward passes of products under torch.autocast, which costs a forward pass a step:
    loss and gradient stay as they are."""

    # Choosing the step
    use_cg_backtracking: bool = True
    """Choose among the kept CG iterates by their loss [1, sec. 4.6]."""
    cg_backtracking: Literal["efficient", "full"] = "efficient"
    """From the last iterate back while the loss falls, or the best of all kept iterates."""
    lr: float = 1.0
    """Step size; the line search's first try."""
    use_linesearch: bool = True
    """Armijo backtracking line search [2, sec. 8.8]; otherwise the constant `lr`."""
    linesearch_beta: float = 0.8
    """Factor on the step size between tries."""
    linesearch_c: float = 1e-2
    """Armijo constant."""
    linesearch_max_iter: int = 60
    """Tries before the step is rejected."""
    candidates_per_pass: int = 1
    """Losses of CG's iterates and of the line search's tries that are computed before one is looked at.
    The choice is the same; more means fewer reductions and waits of the device, and up to so many losses
    less one for nothing."""

    # Preconditioner
    preconditioner: Literal["none", "empirical_fisher"] = "none"
    """Preconditioner of CG: none, or the empirical Fisher diagonal [1, sec. 4.7]."""
    preconditioner_exponent: float = 0.75
    """Exponent of the diagonal preconditioner."""

    def __post_init__(self) -> None:
        if self.product_engine in ("auto", "compile", "torch_linearize"):  # of hfdist 0.1
            warnings.warn(
                f"product_engine={self.product_engine} is gone, linearize takes its place",
                stacklevel=3,
            )
            object.__setattr__(self, "product_engine", "linearize")
        for key, low, high, what in (
            ("damping", 0.0, math.inf, "at least 0"),
            ("damping_min", 0.0, math.inf, "at least 0"),
            ("memory_budget", 0, math.inf, "at least 0"),
            ("damping_increase", 1.0, math.inf, "at least 1"),
            ("damping_decrease", 0.0, 1.0, "between 0 and 1"),
            ("weight_decay", 0.0, math.inf, "at least 0"),
            ("cg_decay_x0", 0.0, 1.0, "between 0 and 1"),
            ("cg_tol", 0.0, math.inf, "at least 0"),
            ("cg_atol", 0.0, math.inf, "at least 0"),
            ("cg_stop_eps", 0.0, math.inf, "at least 0"),
            ("lr", 0.0, math.inf, "at least 0"),
            ("linesearch_c", 0.0, 1.0, "between 0 and 1"),
            ("preconditioner_exponent", 0.0, 1.0, "between 0 and 1"),
        ):
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{key} is {value}: it must be {what}")
        for key in (
            "cg_max_iter",
            "cg_stop_window",
            "cg_residual_replacement",
            "linesearch_max_iter",
            "candidates_per_pass",
            "cg_decay_x0_steps",
        ):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}: it must be at least 1")
        if not 0.0 < self.linesearch_beta < 1.0:
            raise ValueError(
                f"linesearch_beta is {self.linesearch_beta}: it must be between 0 and 1"
            )
        if not self.cg_grid_gamma > 1.0:
            raise ValueError(f"cg_grid_gamma is {self.cg_grid_gamma}: it must be greater than 1")
        if self.damping_max < self.damping_min:
            raise ValueError(
                f"damping_max is {self.damping_max}: it must not be below damping_min "
                f"({self.damping_min})"
            )
        if self.cg_decay_x0_max is not None and not self.cg_decay_x0 <= self.cg_decay_x0_max <= 1.0:
            raise ValueError(
                f"cg_decay_x0_max is {self.cg_decay_x0_max}: it must lie between cg_decay_x0 "
                f"({self.cg_decay_x0}) and 1"
            )
        for key, allowed in _choices().items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}: it must be one of "
                    + ", ".join(map(repr, allowed))
                )

    @classmethod
    def with_preset(cls, preset: str = "default", **changes: Any) -> HFOptions:
        """Options of `preset`, with `changes` on top.

        Raises:
            ValueError: `preset` or a change is not known.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}: it must be one of {', '.join(PRESETS)}")
        return cls(**{"preset": preset, **PRESETS[preset], **changes})


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """The allowed values of the fields that are choices."""
    hints = get_type_hints(HFOptions)
    return {key: get_args(hint) for key, hint in hints.items() if get_origin(hint) is Literal}
