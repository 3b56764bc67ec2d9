"""Rules that tests pin: those of conjugate gradients beside the default ones."""

from __future__ import annotations

from typing import Any

import pytest

CG: dict[str, Any] = {"solver": "cg", "preconditioner": "none"}
"""Truncated Newton by conjugate gradients, damping by the reduction ratio."""

CG_JOB: dict[str, Any] = {"optim": CG, "batches": {"curvature": None}}
"""The same for a job, with the curvature of all of the gradient's examples."""

with_each_solver = pytest.mark.parametrize("rules", [{}, CG], ids=["default", "cg"])
"""The test's argument `rules`: none but the defaults, or CG's."""


def cg_job(values: dict[str, Any]) -> dict[str, Any]:
    """A job's values with CG's rules where they say nothing else."""
    pinned = {key: {**rules, **values.get(key, {})} for key, rules in CG_JOB.items()}
    return {**values, **pinned}
