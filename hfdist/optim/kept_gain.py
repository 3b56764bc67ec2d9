"""How much of what steps gain on their own examples the next examples still show: whether batches are too
small.

A step on few examples fits them, noise included. The next step's loss, on examples drawn anew, shows what is
left of it, for nothing: all, where a step sees the same examples as the last one; little, where a batch says
more of itself than of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MEMORY = 0.95
"""What each step keeps of the sums of the steps before it: about twenty count."""
FIRST = 20
"""Steps before anything is said."""
NOISE = 0.1
"""Part kept under which steps follow the noise of their examples."""
SMALL = 1e-3
"""Gains that add up to less than this part of the loss say nothing: training is at its end."""

ADVICE = (
    "the last steps lowered the loss of their own examples, and on the next ones no more than {kept:.0%} "
    "of that is left: either training is at its end, or batches drawn anew are too small and the steps "
    "follow their noise. Take more examples a step ({key}), or another optimizer: Adam or SOAP, say, "
    "alone or on hfdist.newton_gradient with solver=metric"
)
"""For the one who runs the steps."""


@dataclass(frozen=True, kw_only=True)
class KeptGain:
    """What one step hands to the next of it."""

    own: float = 0.0
    """Sum of the steps' gains on their own examples, the older ones weighted less."""
    kept: float = 0.0
    """The same of what the loss fell by from one step's examples to the next one's."""
    steps: int = 0
    """How many are in the sums."""
    loss: float | None = None
    """Of the last step, before it."""
    gain: float = 0.0
    """Of the last step, on the examples that its candidates were tried on."""
    was_noise: bool = False
    """Steps were found to follow noise before."""

    def seen(self, loss: float) -> KeptGain:
        """With the loss that the next step finds before it."""
        if self.loss is None or not math.isfinite(self.loss - loss):
            return self
        return replace(
            self,
            own=MEMORY * self.own + self.gain,
            kept=MEMORY * self.kept + self.loss - loss,
            steps=self.steps + 1,
            loss=loss,
        )

    def after(self, loss: float, gain: float) -> KeptGain:
        """With a step that began at `loss` and gained so much."""
        was_noise = self.was_noise or self.is_noise
        return replace(
            self, loss=loss, gain=gain if math.isfinite(gain) else 0.0, was_noise=was_noise
        )

    @property
    def ratio(self) -> float:
        """Part kept; NaN as long as too few steps were seen, or gains are too small to tell."""
        if self.steps < FIRST or not self.own > SMALL * abs(self.loss or 0.0):
            return math.nan
        return self.kept / self.own

    @property
    def is_noise(self) -> bool:
        """Whether steps follow the noise of their examples."""
        return self.ratio < NOISE
