"""Tikhonov damping and the rules that choose the next lambda."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from hfdist.optim.option_group import OptionGroup


@dataclass(frozen=True, kw_only=True)
class DampingOptions(OptionGroup):
    """Damping: A = B + damping * I."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "damping": (0.0, math.inf),
        "damping_min": (0.0, math.inf),
        "damping_increase": (1.0, math.inf),
        "damping_decrease": (0.0, 1.0),
        "damping_decay": (0.0, 1.0),
        "structural_damping": (0.0, math.inf),
        "structural_examples": (1e-6, 1.0),
    }

    damping: float = 1.0
    """Initial Tikhonov damping lambda >= 0 [1, sec. 4.1]; 0 switches damping off for good."""
    adapt_damping: bool = True
    """Adapt lambda by `damping_rule`; false is the rule "fixed"."""
    damping_rule: Literal["auto", "lm", "fixed", "schedule", "chosen", "trials"] = "auto"
    """How lambda changes from step to step: by the reduction ratio (lm: Levenberg-Marquardt [1, sec. 4.1]);
    not at all (fixed); by the factor `damping_decay` a step (schedule); to the lambda of the candidate with
    the lowest loss (chosen); to that of the trial that was taken, and a third of it where the ratio is above
    a half (trials) [Transtrum & Sethna 2012]; the first step's trials go on to smaller ones. auto: chosen for
    the solver krylov, trials for dense and sample_space, lm for the others."""
    damping_metric: Literal["identity", "diagonal"] = "identity"
    """D in the damping term lambda D of the solver cg: the identity, or a diagonal estimate of the
    curvature, which makes lambda a number without a unit (scale-sensitive damping [2, sec. 8.3]). The solver
    krylov damps in its preconditioner's metric."""
    structural_damping: float = 0.0
    """mu >= 0: adds lambda mu S to the damped curvature, S the Gauss-Newton matrix of the distance of the
    hidden units from where they are: for recurrent nets, which name them by a method `hidden_units` [2, sec.
    8.4]. For the solver krylov mu has no unit: with 1 it damps the preconditioned gradient as much as the
    metric does."""
    structural_examples: float = 0.25
    """Share of the curvature's examples that S is taken from, of 64 at least."""
    damping_min: float = 1e-12
    """Lower bound of the adapted lambda."""
    damping_max: float = 1e12
    """Upper bound of the adapted lambda."""
    damping_increase: float = 3 / 2
    """Factor on lambda when the reduction ratio is below `reduction_ratio_low`, or not finite."""
    damping_decrease: float = 2 / 3
    """Factor on lambda when the reduction ratio is above `reduction_ratio_high`."""
    damping_decay: float = 0.95
    """Factor on lambda a step under damping_rule=schedule."""
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

    def check(self) -> None:
        if self.damping_max < self.damping_min:
            raise ValueError(
                f"damping_max is {self.damping_max}: it must not be below damping_min "
                f"({self.damping_min})"
            )
        if self.damping and not self.damping_min <= self.damping <= self.damping_max:
            raise ValueError(
                f"damping is {self.damping}: it must be 0, or between damping_min ({self.damping_min}) and "
                f"damping_max ({self.damping_max})"
            )
        if not self.reduction_ratio_low <= self.reduction_ratio_high:
            raise ValueError(
                f"reduction_ratio_low is {self.reduction_ratio_low}: it must not be above "
                f"reduction_ratio_high ({self.reduction_ratio_high})"
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step says about lambda."""

    damping: float
    """lambda of the step."""
    rho: float = math.nan
    """Reduction ratio; NaN where there is none."""
    accepted: bool = False
    candidate_damping: float | None = None
    """lambda of the candidate that was taken, where the solver offered several."""


def reduction_ratio(actual: float, predicted: float) -> float:
    """rho = actual / predicted change of the loss; NaN where the model predicts none.

    Both changes are negative when a good model meets a good step.
    """
    return actual / predicted if predicted != 0.0 else math.nan


def levenberg_marquardt(damping: float, rho: float, options: DampingOptions) -> float:
    """The next lambda: raised for a ratio under 1/4 (or not finite), lowered over 3/4, within bounds
    ([1] sec. 4.1 and [2] sec. 8.5)."""
    if not math.isfinite(rho) or rho < options.reduction_ratio_low:
        return raised(damping, options)
    if rho > options.reduction_ratio_high:
        return max(damping * options.damping_decrease, min(options.damping_min, damping))
    return damping


def raised(damping: float, options: DampingOptions) -> float:
    """lambda after a step that the model did not foresee."""
    return min(damping * options.damping_increase, max(options.damping_max, damping))


# -- rules -------------------------------------------------------------------------------------------


def _lm(outcome: Outcome, options: DampingOptions) -> float:
    following = levenberg_marquardt(outcome.damping, outcome.rho, options)
    if not outcome.accepted and options.raise_damping_on_reject:
        following = max(following, raised(outcome.damping, options))
    return following


def _fixed(outcome: Outcome, options: DampingOptions) -> float:
    return outcome.damping


def _schedule(outcome: Outcome, options: DampingOptions) -> float:
    damping = outcome.damping
    return max(damping * options.damping_decay, min(options.damping_min, damping))


def _chosen(outcome: Outcome, options: DampingOptions) -> float:
    """A rejected step, of none of the candidates, raises the step's own lambda: the last one tried is far
    off, and the next step looks at all sizes."""
    damping = outcome.damping if outcome.candidate_damping is None else outcome.candidate_damping
    if not outcome.accepted:
        damping = 4.0 * outcome.damping
    return min(max(damping, options.damping_min), options.damping_max)


def _trials(outcome: Outcome, options: DampingOptions) -> float:
    """Raised by doubling within the step ("delayed gratification": raised little, lowered much)."""
    damping = outcome.damping if outcome.candidate_damping is None else outcome.candidate_damping
    if not outcome.accepted:  # of none of its trials: the last one's lambda is far off
        damping = 4.0 * outcome.damping
    elif outcome.rho > 0.5:
        damping /= 3.0
    return min(max(damping, options.damping_min), options.damping_max)


DAMPING_RULES: dict[str, Callable[[Outcome, DampingOptions], float]] = {
    "lm": _lm,
    "fixed": _fixed,
    "schedule": _schedule,
    "chosen": _chosen,
    "trials": _trials,
}
"""The rules by their names in `damping_rule`: what the step came to -> the next lambda."""


def next_damping(outcome: Outcome, options: DampingOptions, default: str) -> float:
    """The next lambda by the options' rule; `default` is what "auto" means. Zero stays zero."""
    if outcome.damping == 0.0:
        return 0.0
    return DAMPING_RULES[rule_of(options, default)](outcome, options)


def rule_of(options: DampingOptions, default: str) -> str:
    """The name of the options' rule; `default` is what "auto" means."""
    if not options.adapt_damping:
        return "fixed"
    return default if options.damping_rule == "auto" else options.damping_rule
