"""What is kept of layers between steps: a moving average of statistics, and the metric made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hfdist.curvature.kronecker.blocks import Inverse, factors_of, inverted
from hfdist.curvature.kronecker.eigen import EigenBasis, Moments, eigenbases
from hfdist.curvature.kronecker.factors import Factor
from hfdist.curvature.kronecker.keys import (
    BlockPlan,
    KroneckerKey,
    LayerBlock,
    Rows,
    Seen,
    VectorKey,
    plan_blocks,
)
from hfdist.curvature.kronecker.pace import Pace
from hfdist.curvature.kronecker.statistics import (
    Sampling,
    Statistics,
    take_moments,
    take_statistics,
)
from hfdist.curvature.objective import Problem


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Second moments in the factors' eigenvectors are taken, too (see `eigen`)."""

    refresh: int = 1
    """New eigenvectors every so many refreshes of the statistics."""
    is_metric: bool = True
    """See `eigenbases`."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric was made of besides the statistics, and what came out of it."""

    relative: float
    ratios: Tensor | None
    of_secants: bool = False
    limits: Tensor | None = None
    """See `Inverse`; None where the inverse is there."""
    inverse: Inverse | None = None
    """None after `load_state_dict`: the same bits are made again."""


class StatisticsMemory:
    """The statistics of a run, the same on all ranks."""

    pace: Pace = Pace()
    """How often they are taken."""

    def __init__(self) -> None:
        self._seen: Seen | None = None
        self._statistics: Statistics | None = None
        self._mass = 0.0
        self._metric: Metric | None = None
        self._shares = False
        self._age_of_bases = 0
        self._bases_are_metric = True
        self._shapes: list[list[int]] = []
        self._loaded: Mapping[str, Any] = {}

    def take(
        self,
        problem: Problem,
        sampling: Sampling,
        decay: float = 0.0,
        refresh: int | Literal["auto"] = 1,
        correction: Correction | None = None,
        damping: float = 1.0,
    ) -> tuple[BlockPlan, Statistics]:
        """Statistics for a step. Collective; to be called once a step.

        Args:
            problem: The objective, after its gradient.
            sampling: How much is looked at.
            decay: Of the moving average, sum_k decay^k S_k / sum_k decay^k over the refreshes k ago.
            refresh: New statistics are taken every so many steps, or see `pace`.
            correction: Whether second moments are, and how.
            damping: lambda of the step.
        """
        if self._loaded:
            self._restore(self._loaded, problem.params.zeros()[:0])
            self._loaded = {}
        shapes = [list(t.shape) for t in problem.params.tensors]
        if shapes != self._shapes:  # others are trained than before
            self._statistics, self._seen, self._mass, self._shapes = None, None, 0.0, shapes
            self.pace = Pace()
        is_known = self._statistics is not None and self._seen is not None
        if is_known and not self.pace.is_due(refresh, damping):
            assert self._statistics is not None
            assert self._seen is not None
            self.pace = self.pace.shared()
            return plan_blocks(self._seen, problem.params.tensors), self._statistics
        self._metric, self._shares = None, refresh != 1
        bases = self._bases(correction)
        plan, statistics, self._seen = take_statistics(problem, sampling, self._seen, bases)
        kept = decay * self._mass
        old = self._statistics if kept > 0.0 else None
        if old is not None:
            statistics = statistics.averaged(old, kept)
        self._age_of_bases += 1
        if correction is not None and any(b not in statistics.moments for b in plan.layers):
            # In the newest eigenvectors: the examples are gone through once more.
            factors = {block: factors_of(block, statistics) for block in plan.layers}
            bases = eigenbases(problem.comm, factors, correction.is_metric)
            fresh = take_moments(problem, sampling, bases)
            statistics, self._age_of_bases = statistics.with_moments(fresh, old, kept), 1
            self._bases_are_metric = correction.is_metric
        # What the next step does not need is no part of a checkpoint.
        is_needed = (
            decay > 0.0 or refresh != 1 or (correction is not None and correction.refresh > 1)
        )
        self._statistics = statistics if is_needed else None
        self._mass = kept + 1.0
        self.pace = self.pace.renewed(statistics.cost, damping)
        return plan, statistics

    def metric(
        self,
        problem: Problem,
        plan: BlockPlan,
        statistics: Statistics,
        relative: float,
        ratios: Tensor | None,
        of_secants: bool = False,
    ) -> Inverse:
        """The metric's inverse, of the step that took the statistics. Collective.

        Args:
            problem: The objective, after its gradient.
            plan, statistics: What `take` gave.
            relative, ratios: See `inverted`; what they were then counts.
            of_secants: The step is one without products, whose metrics have a damping of their own.
        """
        kept = self._metric
        if kept is not None and kept.of_secants != of_secants:
            kept = self._metric = None  # as much damping as the other kind of step has
            self._shares = True
        if kept is not None and kept.inverse is not None:
            return kept.inverse
        if kept is not None:  # of a run that goes on
            relative, ratios = kept.relative, kept.ratios
            ratios = None if ratios is None else ratios.to(problem.params.device)
            self._shares = True
        inverse = inverted(problem, plan, statistics, None, relative, ratios)
        if kept is None or kept.limits is None:
            inverse = inverse.limited(problem)
        else:
            inverse = inverse.divided(kept.limits.to(problem.params.device))
        if self._shares:
            self._metric = Metric(
                relative=relative, ratios=ratios, of_secants=of_secants, inverse=inverse
            )
        return inverse

    def _bases(self, correction: Correction | None) -> dict[LayerBlock, EigenBasis]:
        """Those of earlier steps, as long as they serve."""
        if correction is None or self._statistics is None:
            return {}
        # Those of a run that was resumed with another solver do not.
        is_other = correction.is_metric != self._bases_are_metric
        if is_other or self._age_of_bases >= correction.refresh:
            return {}
        return {block: own.basis for block, own in self.moments.items()}

    @property
    def moments(self) -> dict[LayerBlock, Moments]:
        """Those of the last step, where they are kept."""
        return {} if self._statistics is None else self._statistics.moments

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors; empty where the next step needs nothing of it."""
        if self._loaded:
            return dict(self._loaded)
        if self._statistics is None or self._seen is None:
            return {}
        found = self._statistics
        return {
            "shapes": self._shapes,
            "mass": self._mass,
            "pace": dataclasses.asdict(self.pace),
            **self._metric_state(),
            "seen": [
                [_plain(key), [None if bias is None else _plain(bias) for bias in biases]]
                for key, biases in self._seen.layers.items()
            ],
            "seen_vectors": [_plain(key) for key in self._seen.vectors],
            "layers": [
                [_plain(key), A.n, A.blocks, G.n, G.blocks] for key, (A, G) in found.layers.items()
            ],
            "vectors": [[_plain(key), blocks] for key, blocks in found.vectors.items()],
            "others": [[k, mean] for k, mean in found.others.items()],
            **self._moments_state(found),
        }

    def _metric_state(self) -> dict[str, Any]:
        metric = self._metric
        if metric is None:
            return {}
        limits = metric.limits if metric.inverse is None else metric.inverse.limits
        return {
            "metric": {
                "relative": metric.relative,
                "ratios": metric.ratios,
                "limits": limits,
                "of_secants": metric.of_secants,
            }
        }

    def _moments_state(self, found: Statistics) -> dict[str, Any]:
        if not found.moments:
            return {}
        return {
            "age_of_bases": self._age_of_bases,
            "bases_are_metric": self._bases_are_metric,
            "moments": [
                [
                    [_plain(key) for key in block.keys],
                    None if block.bias is None else _plain(block.bias),
                    [*_tensors(own.basis), own.values],
                ]
                for block, own in found.moments.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._statistics, self._seen, self._mass, self._metric = None, None, 0.0, None
        # Of an earlier version: a new one is due.
        self.pace = Pace(**state.get("pace", {}))
        self._loaded = state

    def _restore(self, state: Mapping[str, Any], like: Tensor) -> None:
        def factor(n: int, blocks: Tensor) -> Factor:
            return Factor(blocks=blocks.to(like), n=n)

        self._shapes = [list(shape) for shape in state["shapes"]]
        self._mass = float(state["mass"])
        if "metric" in state:
            self._metric = Metric(**state["metric"])
        self._seen = Seen()
        for key, biases in state["seen"]:
            for bias in biases:
                self._seen.add(_layer_key(key), None if bias is None else Rows(*bias))
        self._seen.vectors = {_vector_key(key) for key in state["seen_vectors"]}
        self._statistics = Statistics(
            layers={
                _layer_key(key): (factor(n, A), factor(m, G)) for key, n, A, m, G in state["layers"]
            },
            vectors={_vector_key(key): blocks.to(like) for key, blocks in state["vectors"]},
            others={int(k): mean.to(like) for k, mean in state["others"]},
        )
        self._age_of_bases = int(state.get("age_of_bases", 0))
        self._bases_are_metric = bool(state.get("bases_are_metric", True))
        moments = {}
        for keys, bias, tensors in state.get("moments", []):
            block = LayerBlock(
                tuple(_layer_key(key) for key in keys), None if bias is None else Rows(*bias)
            )
            G, A, scale, flat_G, flat_A, values = (t.to(like) for t in tensors)
            basis = EigenBasis(G=G, A=A, scale=scale, flat_G=flat_G, flat_A=flat_A)
            moments[block] = Moments(basis=basis, values=values)
        self._statistics = self._statistics.with_moments(moments)


def _tensors(basis: EigenBasis) -> list[Tensor]:
    return [basis.G, basis.A, basis.scale, basis.flat_G, basis.flat_A]


def _plain(key: Any) -> list[Any]:
    """A key as nested lists of numbers."""
    return [
        _plain(v) if dataclasses.is_dataclass(v) else list(v) if isinstance(v, tuple) else v
        for v in (getattr(key, field.name) for field in dataclasses.fields(key))
    ]


def _layer_key(plain: Any) -> KroneckerKey:
    rows, *rest = plain
    return KroneckerKey(Rows(*rows), *rest)


def _vector_key(plain: Any) -> VectorKey:
    params, *rest = plain
    return VectorKey(tuple(params), *rest)
