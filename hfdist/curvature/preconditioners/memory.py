"""What preconditioners keep from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfdist.curvature.kronecker.memory import StatisticsMemory


class PreconditionerMemory:
    """Of one run; the same on all ranks. What resuming needs of it is in `state_dict`."""

    def __init__(self) -> None:
        self.statistics = StatisticsMemory()

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        return {"statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; from nothing, as at the start of a run."""
        self.statistics.load_state_dict(state.get("statistics", {}))
