"""Choice among a solver's candidates by their loss: CG backtracking, [1] sec. 4.6; a search over lambda."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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


def further_descent(choice: Choice, indices: Iterable[int], loss_of: LossOf) -> Choice:
    """From a choice on along the candidates while the loss falls."""
    for index in indices:
        loss = _ordered(loss_of([index])[0])
        if not loss < choice.loss:
            break
        choice = Choice(index, loss)
    return choice


NEARLY = 0.1
"""Part of the best candidate's gain that is given up for a smaller lambda."""


def climb(num_candidates: int, centre: int, loss_of: LossOf, loss_0: float, wide: bool) -> Choice:
    """Choose among candidates of falling lambda: the lowest loss, searched for uphill and downhill.

    The centre and its neighbours are evaluated together, then neighbours of the best one while that
    falls; and towards large lambda as long as no loss is below loss_0. Of those that gain nearly as much as
    the best, the one of the smallest lambda is taken: the loss after one step says little of directions
    in which many steps have to go, and the greedy choice dwells on the others.

    Args:
        num_candidates: At least 1.
        centre: Where the search begins.
        loss_of: Their losses; non-finite counts as worse than anything.
        loss_0: The loss without a step.
        wide: Begin with every third candidate: nothing is known of the right lambda.
    """
    known: dict[int, float] = {}

    def look(indices: Iterable[int]) -> int:
        new = [k for k in indices if 0 <= k < num_candidates and k not in known]
        if new:
            known.update(zip(new, map(_ordered, loss_of(new))))
        return min(sorted(known), key=known.__getitem__)

    best = look(range(0, num_candidates, 3) if wide else (centre - 1, centre, centre + 1))
    while True:
        if known[best] < loss_0:
            following = look((best - 1, best + 1))
        else:
            following = look((min(known) - 1,))
            if following == best and min(known) > 0:
                continue
        if following == best:
            break
        best = following
    enough = known[best] + NEARLY * (loss_0 - known[best])
    chosen = max(k for k in known if known[k] <= enough) if known[best] < loss_0 else best
    return Choice(chosen, known[chosen])


def _ordered(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
