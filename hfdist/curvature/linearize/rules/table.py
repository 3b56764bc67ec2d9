"""The table that rules are entered in, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hfdist.curvature.linearize.call import Call, Map

Rule = Callable[[Call], Map]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under names of operations."""

    def enter(f: Rule) -> Rule:
        RULES.update({f"aten::{name}": f for name in names})
        return f

    return enter


def can_hold(x: Tensor, free: bool, shape: Any, dtype: Any) -> bool:
    """Whether a tangent may be overwritten with a result of this shape and type."""
    # An expanded tensor (stride 0) holds one number in many places.
    return free and x.shape == shape and x.dtype == dtype and 0 not in x.stride()


def scaled(p: int, factor: Any, out: Tensor) -> Map:
    """factor * tangent, of the output's shape."""
    shape, dtype = out.shape, out.dtype

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        x = t[p]
        if can_hold(x, free[p], shape, dtype):
            return x.mul_(factor)
        x = x * factor
        return x if x.shape == shape else x.expand(shape)

    return f
