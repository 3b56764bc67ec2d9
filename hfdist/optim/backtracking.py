"""Choice among CG's iterates by their loss: CG backtracking, [1] sec. 4.6."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LossOf = Callable[[Sequence[int]], list[float]]
"""Losses of candidates, by their indices in the list of candidates; evaluated together."""


@dataclass(frozen=True)
class Choice:
    """The chosen candidate."""

    index: int
    loss: float


def backtrack(num_candidates: int, loss_of: LossOf, rule: str, at_once: int = 1) -> Choice:
    """Choose a candidate.

    Args:
        num_candidates: Number of kept iterates, at least 1.
        loss_of: Their losses; non-finite counts as worse than anything.
        rule: "efficient": from the last towards the first while the loss falls (a non-finite loss is
            passed over); "full": the lowest of all.
        at_once: Losses that are asked for together; the choice does not depend on it.
    """
    if rule == "full":
        losses = [_ordered(loss) for loss in loss_of(range(num_candidates))]
        index = min(range(num_candidates), key=losses.__getitem__)
        return Choice(index, losses[index])
    best = Choice(num_candidates - 1, math.inf)
    indices = range(num_candidates)[::-1]
    for start in range(0, num_candidates, at_once):
        group = indices[start : start + at_once]
        for index, loss in zip(group, map(_ordered, loss_of(group))):
            if loss < best.loss:
                best = Choice(index, loss)
            elif math.isfinite(best.loss):
                return best
    return best


def first_descent(num_candidates: int, loss_of: LossOf, loss_0: float) -> Choice:
    """The first candidate with a loss below `loss_0`; the last if there is none."""
    for index in range(num_candidates):
        loss = _ordered(loss_of([index])[0])
        if loss < loss_0:
            break
    return Choice(index, loss)


def _ordered(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
