"""Which blocks of a metric are wrong by more than the others, seen along a solve's own directions.

Kronecker factors and diagonals take what acts together for independent: along C^-1 g a layer's true curvature
can be thousands of times its block's, where many flat directions of the block move the same outputs. The
space shows it for nothing. For its directions u_j, and the part u_jl of block l,

    r_l = sum_j u_jl'(B u_j)_l / sum_j u_jl'(C u_j)_l

Blocks above the median get that much more damping, those below it that much less. Neither the loss's scale
nor a layer's units change r_l.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hfdist.curvature.objective import Problem

KEPT = 0.5
"""What each solve keeps of the logarithms of those before it."""
MOST = math.log(1e3)
"""The furthest from the median, either way."""


class CurvatureRatios:
    """r_l over the median, of each parameter of a run; the same on all ranks. A block's is that of its first
    parameter. Sums stay on the device; the host looks at none."""

    def __init__(self) -> None:
        self._log: Tensor | None = None  # [parameters]: moving average of log(r_l / median)
        self._sums: Tensor | None = None  # [2, parameters]: of the solve since then, this rank's
        # Of the step that they are from.
        self._total: Callable[[Tensor], Tensor] = lambda sums: sums
        self._spans: list[tuple[int, int]] = []
        self._matrices: list[int] = []

    def copy(self) -> CurvatureRatios:
        """Shares tensors, which nothing writes to."""
        return copy.copy(self)

    def begin(self, problem: Problem) -> Tensor | None:
        """What the damping of each parameter's block is multiplied by [parameters]; None before the first
        solve. A new one begins, whose directions are looked at. Collective."""
        self._log, self._sums = self._averaged(), None
        if self._log is not None and len(self._log) != len(problem.params.tensors):
            self._log = None  # others are trained than before
        self._total, self._spans = problem.total_of, problem.part_spans
        self._matrices = [k for k, t in enumerate(problem.params.tensors) if t.ndim > 1]
        problem.on_direction = self._add
        if self._log is None:
            return None
        self._log = self._log.to(problem.params.device)
        return self._log.exp()

    def _add(self, u: Tensor, Bu: Tensor, Cu: Tensor) -> None:
        sums = torch.stack(
            [torch.stack([torch.dot(u[a:b], w[a:b]) for a, b in self._spans]) for w in (Bu, Cu)]
        ).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def _averaged(self) -> Tensor | None:
        if self._sums is None:
            return self._log
        seen, expected = self._total(self._sums.clone())
        ratio = seen / expected
        log = torch.where(
            (seen > 0.0) & (expected > 0.0) & ratio.isfinite(), ratio, torch.nan
        ).log()
        weights = [log[k] for k in self._matrices] or list(log)
        # A block that says nothing is taken for one in the middle.
        distance = torch.nan_to_num(log - torch.stack(weights).nanmedian()).clamp(-MOST, MOST)
        average = (1.0 - KEPT) * distance
        return average if self._log is None else average + KEPT * self._log.to(distance)

    def state_dict(self) -> dict[str, Any]:
        """What the next step begins with. Collective."""
        log = self._averaged()
        return {} if log is None else {"log": log}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._log, self._sums = state.get("log"), None
