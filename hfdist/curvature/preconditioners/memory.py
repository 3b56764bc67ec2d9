"""What preconditioners keep from step to step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hfdist.curvature.kronecker.memory import StatisticsMemory
from hfdist.curvature.kronecker.ratios import CurvatureRatios
from hfdist.optim.secants import Secants

Vectors = Callable[[Tensor], Tensor]


class PreconditionerMemory:
    """Of one run; the same on all ranks but for the parts of vectors. `state_dict` is what resuming needs."""

    def __init__(self) -> None:
        self.statistics = StatisticsMemory()
        self.ratios = CurvatureRatios()
        self.diagonal = MovingAverage()
        self.pairs = PairMemory()
        self.secants = Secants()
        self.knows_layers: bool | None = None
        """What `auto` found."""

    def copy(self) -> PreconditionerMemory:
        """For going back to when a step is abandoned; shares tensors where steps replace them."""
        kept = copy.copy(self)
        kept.statistics, kept.diagonal = copy.copy(self.statistics), copy.copy(self.diagonal)
        kept.pairs, kept.ratios = self.pairs.copy(), self.ratios.copy()
        kept.secants = self.secants.copy()
        return kept

    def after(self, work: float, accepted: bool) -> None:
        """A step was taken.

        Args:
            work: Of it without its metric, in gradients (see `Costs`).
            accepted: Whether parameters moved.
        """
        self.statistics.pace = self.statistics.pace.after(work, accepted)

    def state_dict(self, whole: Vectors = lambda part: part) -> dict[str, Any]:
        """Plain data and tensors.

        Args:
            whole: This rank's part of a vector -> the whole one. Collective.
        """
        found = {
            "statistics": self.statistics.state_dict(),
            "ratios": self.ratios.state_dict(),
            "diagonal": self.diagonal.state_dict(),
            "pairs": self.pairs.state_dict(whole),
            "secants": self.secants.state_dict(lambda part: _whole(whole, part)),
        }
        found = {key: value for key, value in found.items() if value}
        return found if self.knows_layers is None else {**found, "knows_layers": self.knows_layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; from nothing, as at the start of a run."""
        self.statistics.load_state_dict(state.get("statistics", {}))
        self.ratios.load_state_dict(state.get("ratios", {}))
        self.diagonal.load_state_dict(state.get("diagonal", {}))
        self.pairs.load_state_dict(state.get("pairs", {}))
        self.secants.load_state_dict(state.get("secants", {}))
        self.knows_layers = state.get("knows_layers")


class MovingAverage:
    """sum_k decay^k d_k / sum_k decay^k of vectors d_k, taken every so many steps."""

    def __init__(self) -> None:
        self._mean: Tensor | None = None
        self._mass = 0.0
        self._age = 0

    def take(self, fresh: Callable[[], Tensor], decay: float, refresh: int) -> Tensor:
        """The average of a step; to be called once a step.

        Args:
            fresh: A new vector, of the same length as before or a first one.
            decay, refresh: As above.
        """
        if self._mean is not None and self._age < refresh:
            self._age += 1
            return self._mean
        mean, kept = fresh(), decay * self._mass
        if self._mean is not None and len(self._mean) == len(mean):
            mean = (mean + kept * self._mean.to(mean)) / (1.0 + kept)
        else:
            kept = 0.0
        self._mean = mean if decay > 0.0 or refresh > 1 else None
        self._mass, self._age = kept + 1.0, 1
        return mean

    def state_dict(self) -> dict[str, Any]:
        if self._mean is None:
            return {}
        return {"mean": self._mean, "mass": self._mass, "age": self._age}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean = state.get("mean")
        self._mass, self._age = float(state.get("mass", 0.0)), int(state.get("age", 0))


class PairMemory:
    """Vectors v of a solve and their products Bv, spread evenly over its iterations (Morales & Nocedal 2000,
    section 2); this rank's parts."""

    def __init__(self) -> None:
        self._last: list[tuple[Tensor, Tensor]] = []
        self._now: list[tuple[Tensor, Tensor]] = []
        self._stride, self._count = 1, 0

    def copy(self) -> PairMemory:
        """Shares the vectors, which nothing writes to."""
        kept = copy.copy(self)
        kept._last, kept._now = list(self._last), list(self._now)
        return kept

    def begin(self, part: Vectors) -> list[tuple[Tensor, Tensor]]:
        """Pairs of the solve that ended; a new one begins.

        Args:
            part: A whole vector, after `load_state_dict`, -> this rank's part.
        """
        if self._now:
            self._last = self._now
        elif self._loaded:
            self._last = [(part(v), part(Bv)) for v, Bv in self._last]
        self._now, self._stride, self._count, self._loaded = [], 1, 0, False
        return self._last

    _loaded = False

    def add(self, v: Tensor, Bv: Tensor, most: int) -> None:
        """A product of the present solve; copies, and keeps at most `most`."""
        if self._count % self._stride == 0:
            if len(self._now) == most:
                self._now = self._now[::2]
                self._stride *= 2
            if self._count % self._stride == 0:
                self._now.append((v.clone(), Bv.clone()))
        self._count += 1

    def state_dict(self, whole: Vectors) -> dict[str, Any]:
        pairs = self._now or self._last
        if self._loaded or not pairs:
            return {"pairs": [list(pair) for pair in pairs]} if pairs else {}
        return {"pairs": [[_whole(whole, t) for t in pair] for pair in pairs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._now = []
        self._last = [(v, Bv) for v, Bv in state.get("pairs", [])]
        self._loaded = bool(self._last)


def _whole(whole: Vectors, part: Tensor) -> Tensor:
    """A whole vector of its own."""
    vector = whole(part)
    return vector if vector is part else vector.clone()
