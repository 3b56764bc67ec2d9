"""Directional derivatives of a forward pass: its operations, recorded once, replayed on tangents."""

from hfdist.curvature.linearize.call import Jacobian, Unsupported
from hfdist.curvature.linearize.program import Program
from hfdist.curvature.linearize.recorder import Recorder

__all__ = ["Jacobian", "Program", "Recorder", "Unsupported"]
