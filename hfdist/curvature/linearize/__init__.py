"""Directional derivatives of a forward pass: its operations, recorded once, replayed on tangents."""

from hfdist.curvature.linearize.call import Jacobian, Unsupported, any_direction
from hfdist.curvature.linearize.compiling import compiled
from hfdist.curvature.linearize.program import Program
from hfdist.curvature.linearize.recorder import Recorder
from hfdist.curvature.linearize.torch_func import by_torch

__all__ = [
    "Jacobian",
    "Program",
    "Recorder",
    "Unsupported",
    "any_direction",
    "by_torch",
    "compiled",
]
