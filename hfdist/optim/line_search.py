"""Armijo backtracking line search, [2] sec. 8.8."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hfdist.optim.options import HFOptions


@dataclass(frozen=True)
class LineSearchResult:
    """alpha is 0 and the loss that of the start when no try satisfies the condition."""

    alpha: float
    loss: float


def line_search(
    loss_at: Callable[[float], float],
    loss_0: float,
    slope: float,
    options: HFOptions,
    *,
    loss_1: float | None = None,
) -> LineSearchResult:
    """The first alpha in lr, lr beta, lr beta^2, ... with f(alpha) <= f(0) + c alpha f'(0).

    Args:
        loss_at: f(alpha), the loss along the step.
        loss_0: f(0).
        slope: f'(0), the gradient times the step. A positive one (the gradient and the loss may come
            from different batches) counts as 0, so that the loss never rises.
        options: The `lr` and `linesearch_*` constants.
        loss_1: f(1), where it is known.
    """
    slope = min(slope, 0.0)
    alpha = options.lr
    for _ in range(options.linesearch_max_iter):
        loss = loss_1 if loss_1 is not None and alpha == 1.0 else loss_at(alpha)
        if math.isfinite(loss) and loss <= loss_0 + options.linesearch_c * alpha * slope:
            return LineSearchResult(alpha, loss)
        alpha *= options.linesearch_beta
    return LineSearchResult(0.0, loss_0)
