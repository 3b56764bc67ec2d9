"""The equations, in the sizes of the jobs in deploy/jobs: all in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hfdist.bench.optimizers import problems
from hfdist.bench.optimizers.problems import Comparison
from hfdist.config.job import RunConfig


def _equation(name: str, description: str, **task_args: Any) -> Comparison:
    return Comparison(
        description=description,
        task=f"hfdist.tasks.equations:{name}",
        task_args=task_args,
        dtype="float64",
    )


PROBLEMS: dict[str, Comparison] = {
    "poisson2d": _equation("Poisson", "Poisson in the plane, 257 parameters"),
    "poisson2d-deep": _equation(
        "Poisson", "Poisson in the plane, 9,873 parameters", widths=[64, 64, 48, 48]
    ),
    "poisson5d": _equation(
        "Poisson",
        "Poisson in five dimensions, 449 parameters, points anew in every step",
        dimension=5,
        solution="cosines",
        interior=3000,
        conditions=500,
        every_step=True,
    ),
    "heat1d": _equation("Heat", "heat on an interval, 257 parameters"),
    "convection": _equation(
        "Convection",
        "convection at speed 40, 2,751 parameters",
        widths=[50, 50],
        interior=2000,
        conditions=400,
    ),
    "reaction": _equation(
        "Reaction",
        "reaction to saturation, 1,801 parameters",
        widths=[40, 40],
        interior=1500,
        conditions=300,
    ),
    "burgers": _equation(
        "Burgers",
        "Burgers with a shock, 921 parameters",
        widths=[20, 20, 20],
        interior=2500,
        conditions=300,
    ),
}


def named(name: str, overrides: Sequence[str]) -> tuple[str, RunConfig]:
    """A problem by its name, or a job file: its name and job.

    Raises:
        ConfigError: It is neither.
    """
    found, config, _ = problems.named(name, overrides, PROBLEMS)
    return found, config
