"""Armijo backtracking line search, [2] sec. 8.8."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hfdist.optim.choice import ChoiceOptions


@dataclass(frozen=True)
class LineSearchResult:
    """alpha is 0 and the loss that of the start when no try satisfies the condition."""

    alpha: float
    loss: float


def line_search(
    losses_at: Callable[[Sequence[float]], list[float]],
    loss_0: float,
    slope: float,
    options: ChoiceOptions,
    *,
    loss_1: float | None = None,
) -> LineSearchResult:
    """The first alpha in lr, lr beta, lr beta^2, ... with f(alpha) <= f(0) + c alpha f'(0).

    Args:
        losses_at: f(alpha), the loss along the step, for several alpha.
        loss_0: f(0).
        slope: f'(0), the gradient times the step. A positive one (the gradient and the loss may come
            from different batches) counts as 0, so that the loss never rises.
        options: The `lr` and `linesearch_*` constants, and how many losses are asked for together, once
            the first alpha was refused.
        loss_1: f(1), where it is known.
    """
    slope = min(slope, 0.0)
    alphas = [options.lr]
    while len(alphas) < options.linesearch_max_iter:
        alphas.append(alphas[-1] * options.linesearch_beta)
    # The first is usually taken.
    groups = [alphas[:1]] + [
        alphas[k : k + options.candidates_per_pass]
        for k in range(1, len(alphas), options.candidates_per_pass)
    ]
    for group in groups:
        losses = losses_at(group) if loss_1 is None or group != [1.0] else [loss_1]
        for alpha, loss in zip(group, losses):
            if math.isfinite(loss) and loss <= loss_0 + options.linesearch_c * alpha * slope:
                return LineSearchResult(alpha, loss)
    return LineSearchResult(0.0, loss_0)
