"""The table that rules are entered in, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hfdist.curvature.linearize.call import Call, Map

Rule = Callable[[Call], Map]
RULES: dict[str, Rule] = {}
READS_RESULT_ONLY: set[str] = set()
"""Rules that need no value of an argument: in place, nothing has to be copied for them."""
READS_NO_CONSTANT: set[str] = set()
"""Rules whose map reads no value of an argument without a tangent, so that it may change afterwards."""


def rule(
    *names: str, reads_result_only: bool = False, reads_no_constant: bool = False
) -> Callable[[Rule], Rule]:
    """Enter a rule under names of operations."""

    def enter(f: Rule) -> Rule:
        full = [f"aten::{name}" for name in names]
        RULES.update(dict.fromkeys(full, f))
        if reads_result_only:
            READS_RESULT_ONLY.update(full)
        if reads_no_constant:
            READS_NO_CONSTANT.update(full)
        return f

    return enter


def can_hold(x: Tensor, free: bool, shape: Any, dtype: Any) -> bool:
    """Whether a tangent may be overwritten with a result of this shape and type."""
    return free and x.shape == shape and x.dtype == dtype and not overlaps(x)


def overlaps(x: Tensor) -> bool:
    """Whether one number in memory may be in several places of a tensor, as in those of expand, unfold and
    as_strided: none of them can be written to alone."""
    if x.is_contiguous():
        return False
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


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
