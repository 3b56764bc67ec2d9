"""How many of the gradient's examples the curvature is taken from: `batches.curvature: auto`.

Early steps are short of their mark anyway, and a part of the examples shows them the way for less. A solve
that fits few examples too closely takes directions for flat that are not: then there is more curvature along
the last step on other examples than on its own. That is seen for nothing, since the last step belongs to the
next Krylov space: an inner-product test in the sense of Bollapragada et al. 2018, of the curvature in place
of the gradient. Curvature also rises along a step on the same examples, by a factor of about 2 on the
problems looked at, so the test asks for more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_EXAMPLES = 256
"""The first share is of at least so many examples, ..."""
LEAST_SHARE = 1 / 8
"""... and at least this."""
LIMIT = 2.5
"""Ratio of the curvatures, averaged over some steps, over which the share doubles."""
LEAST_RHO = 0.7
"""Reduction ratio, averaged likewise, under which it doubles, too: what the model promises is not there."""
MEMORY = 0.6
"""What each step keeps of the average of the steps before it."""


@dataclass(frozen=True, kw_only=True)
class CurvatureShare:
    """What one step hands to the next of it."""

    share: float | None = None
    """Of the gradient's examples; None before the first step."""
    log_ratio: float = 0.0
    """Moving average of the logarithm of the ratio."""
    rho: float = 1.0
    """Moving average of the reduction ratio."""

    def at(self, num_examples: int) -> float:
        """The share of the next step, with so many examples of the gradient."""
        if self.share is not None:
            return self.share
        return min(1.0, max(LEAST_SHARE, LEAST_EXAMPLES / max(num_examples, 1)))

    def after(self, ratio: float, rho: float, accepted: bool, share: float) -> CurvatureShare:
        """What a step says about it.

        Args:
            ratio: Curvature along the last step, on this step's examples over that on its own; NaN where
                it is not known.
            rho: Reduction ratio of this step, against the undamped model.
            accepted: A rejected step asks for more examples, too.
            share: What the step used.
        """
        log_ratio = self.log_ratio
        if ratio > 0.0:
            log_ratio = MEMORY * log_ratio + (1.0 - MEMORY) * math.log(ratio)
        mean_rho = self.rho
        if math.isfinite(rho):
            mean_rho = MEMORY * mean_rho + (1.0 - MEMORY) * min(max(rho, 0.0), 1.0)
        is_poor = log_ratio > math.log(LIMIT) or mean_rho < LEAST_RHO or not accepted
        if share < 1.0 and is_poor:
            return CurvatureShare(share=min(1.0, 2.0 * share))
        return CurvatureShare(share=share, log_ratio=log_ratio, rho=mean_rho)
