"""Rules that tests pin: those of conjugate gradients beside the default ones."""

from __future__ import annotations

from typing import Any

import pytest

CG: dict[str, Any] = {"solver": "cg", "preconditioner": "none"}
"""Truncated Newton by conjugate gradients, damping by the reduction ratio."""

DEFAULT: dict[str, Any] = {"solver": "auto", "preconditioner": "kfac"}
"""The default rules, where a test's own pin CG's."""

CG_OVERRIDES = [f"optim.{key}={value}" for key, value in CG.items()]
"""The same on a command line."""

with_each_solver = pytest.mark.parametrize("rules", [{}, CG], ids=["default", "cg"])
"""The test's argument `rules`: none but the defaults, or CG's."""
