"""Derivatives of operations, by name: the table that the recorder looks them up in.

A rule takes a `Call` and returns its map of tangents. What does not depend on the tangents is computed
once, in the rule; the map then runs fused kernels, in place where its argument is free. An operation
without a rule has the generic derivative, which is slower.
"""

from hfdist.curvature.linearize.rules import algebra, elementwise, layers, rearrange
from hfdist.curvature.linearize.rules.table import READS_NO_CONSTANT, READS_RESULT_ONLY, RULES

__all__ = [
    "READS_NO_CONSTANT",
    "READS_RESULT_ONLY",
    "RULES",
    "algebra",
    "elementwise",
    "layers",
    "rearrange",
]
