"""What became of one optimizer with one setting and seed: losses by work, seconds and updates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Measure = Literal["gradients", "seconds", "updates"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update of the parameters, as a contender tells of it."""

    loss: float
    """Loss of the whole batch before it, regularisation included."""
    work: float
    """In gradient-equivalents of the whole batch."""
    number: int = 1
    """Updates that it stands for: an optimizer may tell of several at once."""


@dataclass(kw_only=True)
class Curve:
    """Where a contender stood, from the start on."""

    optimizer: str
    setting: str
    seed: int
    is_interleaved: bool = False
    """Its updates took turns with those of the others of its seed, so that their seconds compare."""
    gradients: list[float] = field(default_factory=lambda: [0.0])
    """Work so far, in gradient-equivalents of the batch."""
    seconds: list[float] = field(default_factory=lambda: [0.0])
    """Training time so far."""
    updates: list[int] = field(default_factory=lambda: [0])
    """Updates so far."""
    losses: list[float] = field(default_factory=list)
    """Loss of the batch, regularisation included; the last entry is the loss after the last update."""

    def add(self, update: Update, seconds: float) -> None:
        """An update that took so many seconds."""
        self.losses.append(update.loss)
        self.gradients.append(self.gradients[-1] + update.work)
        self.seconds.append(self.seconds[-1] + seconds)
        self.updates.append(self.updates[-1] + update.number)

    @property
    def has_diverged(self) -> bool:
        """Whether the last loss is no number."""
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    @property
    def lowest(self) -> float:
        """The lowest loss."""
        return min((loss for loss in self.losses if math.isfinite(loss)), default=math.inf)

    def first(self, loss: float, measure: Measure) -> float:
        """What it took until the loss was first no more than this; infinite if it never was."""
        for k, reached in enumerate(self.losses):
            if reached <= loss:
                return float(getattr(self, measure)[k])
        return math.inf

    def loss_at(self, gradients: float) -> float:
        """The lowest loss within so much work."""
        within = [
            loss
            for loss, work in zip(self.losses, self.gradients)
            if work <= gradients and math.isfinite(loss)
        ]
        return min(within, default=math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, rounded to what a table or picture shows."""
        return {
            "optimizer": self.optimizer,
            "setting": self.setting,
            "seed": self.seed,
            "is_interleaved": self.is_interleaved,
            "gradients": [round(value, 2) for value in self.gradients],
            "seconds": [round(value, 4) for value in self.seconds],
            "updates": self.updates,
            "losses": [float(f"{loss:.6g}") for loss in self.losses],
        }
