"""How often statistics of layers are taken and inverted: `preconditioner_refresh: auto`.

On few examples beside the layers' widths a metric takes as long as the products that it saves. It changes
slowly, so some steps share one. Work is counted in matrix products, not measured, so that what follows from
it is the same on every rank and in a resumed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hfdist.curvature.kronecker.calls import LayerSums
from hfdist.curvature.kronecker.keys import KroneckerKey

SHARE = 0.075
"""What a metric may take of the work of the steps that share it, and at most half as much again, since steps
are whole. One that takes less than twice as much of a single step is not shared."""
MOST = 20
"""The most steps that share a metric."""
YOUNG = 5
"""So many steps at the start share none: averages are of few examples, parameters move far."""
MOVED = 10.0
"""A metric whose lambda is so far from the step's, either way, is not shared on: its blocks' damping follows
lambda."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What one step hands to the next of it."""

    number: int = 0
    """Metrics so far."""
    age: int = 0
    """Steps that had the present one."""
    cost: float = 0.0
    """Of it, in gradients."""
    work: float = 0.0
    """Of the steps that had it, but for the metric's own, in gradients."""
    last: float = 0.0
    """Of the last of them."""
    accepted: bool = True
    """Whether that was."""
    damping: float = 1.0
    """lambda that it was made for."""

    def is_due(self, refresh: int | Literal["auto"], damping: float) -> bool:
        """Whether the next step takes a new metric.

        Args:
            refresh: Steps that share one.
            damping: lambda of the step.
        """
        if refresh != "auto":
            return self.age >= refresh
        is_young = self.number < YOUNG or not self.accepted or self.last <= 0.0
        moved = max(damping, self.damping) > MOVED * min(damping, self.damping)
        is_paid = SHARE * (self.work + self.last) > self.cost
        return is_young or moved or is_paid or self.age >= MOST

    def renewed(self, cost: float, damping: float) -> Pace:
        """With a new metric."""
        return Pace(number=self.number + 1, age=1, cost=cost, damping=damping)

    def shared(self) -> Pace:
        """One step more has it."""
        return replace(self, age=self.age + 1)

    def after(self, work: float, accepted: bool) -> Pace:
        """What a step took, without its metric."""
        return replace(self, work=self.work + work, last=work, accepted=accepted)


def cost_of(
    keys: Sequence[KroneckerKey],
    sums: Sequence[LayerSums],
    uses: Sequence[float],
    samples: int,
    share: float,
) -> float:
    """Statistics and inverses, in gradients: of a layer of R uses a gradient is 3 matrix products of 2 R in
    out operations, statistics are a forward pass, a backward pass to the result, and the outer products of
    both sides; an inverse of m rows takes m^3 at half the speed of a product.

    Args:
        keys: Of the layers.
        sums: Of the layers, for their factors' shapes.
        uses: Of each layer, by the examples that were looked at.
        samples: Random vectors an example.
        share: Of the gradient's examples that were looked at.
    """
    gradient = metric = 0.0
    for key, layer, number in zip(keys, sums, uses):
        product = 2.0 * number * key.groups * key.num_inputs * key.num_outputs
        factors = [factor.blocks for factor in (layer.A, layer.G) if not factor.is_diagonal]
        metric += sum(
            2.0 * samples * number * m.numel() + 2.0 * m.numel() * m.shape[-1] for m in factors
        )
        if not key.is_one_hot:
            gradient += 3.0 * product
            metric += (1.0 + samples) * product
    return metric * share / gradient if gradient > 0.0 else 0.0
