"""Tikhonov damping and its Levenberg-Marquardt adaptation, [1] sec. 4.1 and [2] sec. 8.5."""

from __future__ import annotations

import math

from hfdist.optim.options import HFOptions


def reduction_ratio(actual: float, predicted: float) -> float:
    """rho = actual / predicted change of the loss; NaN where the model predicts none.

    Both changes are negative when a good model meets a good step.
    """
    return actual / predicted if predicted != 0.0 else math.nan


def levenberg_marquardt(damping: float, rho: float, options: HFOptions) -> float:
    """The next lambda: raised for a ratio under 1/4 (or not finite), lowered over 3/4, within bounds."""
    if not math.isfinite(rho) or rho < options.reduction_ratio_low:
        return raised(damping, options)
    if rho > options.reduction_ratio_high:
        return max(damping * options.damping_decrease, min(options.damping_min, damping))
    return damping


def raised(damping: float, options: HFOptions) -> float:
    """lambda after a step that the model did not foresee."""
    return min(damping * options.damping_increase, max(options.damping_max, damping))
