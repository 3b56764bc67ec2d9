"""Statistics that are kept between steps: a moving average, or those of the last refresh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hfdist.curvature.kronecker.factors import Factor
from hfdist.curvature.kronecker.keys import (
    BlockPlan,
    KroneckerKey,
    Rows,
    Seen,
    VectorKey,
    plan_blocks,
)
from hfdist.curvature.kronecker.statistics import Sampling, Statistics, take_statistics
from hfdist.curvature.objective import Problem


class StatisticsMemory:
    """The statistics of a run, the same on all ranks."""

    def __init__(self) -> None:
        self._seen: Seen | None = None
        self._statistics: Statistics | None = None
        self._mass = 0.0
        self._age = 0
        self._shapes: list[list[int]] = []
        self._loaded: Mapping[str, Any] = {}

    def take(
        self, problem: Problem, sampling: Sampling, decay: float = 0.0, refresh: int = 1
    ) -> tuple[BlockPlan, Statistics]:
        """Statistics for a step. Collective; to be called once a step.

        Args:
            problem: The objective, after its gradient.
            sampling: How much is looked at.
            decay: Of the moving average, sum_k decay^k S_k / sum_k decay^k over the refreshes k ago.
            refresh: New statistics are taken every so many steps.
        """
        if self._loaded:
            self._restore(self._loaded, problem.params.zeros()[:0])
            self._loaded = {}
        shapes = [list(t.shape) for t in problem.params.tensors]
        if shapes != self._shapes:  # others are trained than before
            self._statistics, self._seen, self._mass, self._shapes = None, None, 0.0, shapes
        if self._statistics is not None and self._seen is not None and self._age < refresh:
            self._age += 1
            return plan_blocks(self._seen, problem.params.tensors), self._statistics
        plan, statistics, self._seen = take_statistics(problem, sampling, self._seen)
        kept = decay * self._mass
        if self._statistics is not None and kept > 0.0:
            statistics = statistics.averaged(self._statistics, kept)
        # What the next step does not need is no part of a checkpoint.
        is_needed = decay > 0.0 or refresh > 1
        self._statistics = statistics if is_needed else None
        self._mass, self._age = kept + 1.0, 1
        return plan, statistics

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
            "age": self._age,
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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._statistics, self._seen, self._mass, self._age = None, None, 0.0, 0
        self._loaded = state

    def _restore(self, state: Mapping[str, Any], like: Tensor) -> None:
        def factor(n: int, blocks: Tensor) -> Factor:
            return Factor(blocks=blocks.to(like), n=n)

        self._shapes = [list(shape) for shape in state["shapes"]]
        self._mass, self._age = float(state["mass"]), int(state["age"])
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
