"""Which points of which terms a step sees, and who evaluates them: a pure function of (step, rank, world
size).

Every step takes all points of every term. A term's points are cut into microbatches, of its own size or one a
rank, and ranks take whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hfdist.data.config import BatchesConfig
from hfdist.data.plan import MicrobatchPlan, RolePlan, StepPlan
from hfdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TermSize:
    """What a plan needs to know of a term."""

    num_points: int
    microbatch: int | None
    every_step: bool
    """Whether its points are drawn anew in every step."""


def plan_points(
    config: BatchesConfig, terms: Sequence[TermSize], *, step: int, rank: int, world_size: int
) -> StepPlan:
    """This rank's points of a step.

    Args:
        config: `curvature` may be a fraction: the first points of every term (auto is all of them); and
        `microbatch` is the terms'
            that have none of their own.
        terms: In their order.
        step, rank, world_size: What the plan is a function of.

    Raises:
        ConfigError: `config` asks for what a task's terms decide.
    """
    for key in ("gradient", "line_search"):
        if getattr(config, key) is not None:
            raise ConfigError(
                f"batches.{key} is set, but the task's terms say how many points a step takes: leave it null"
            )
    if isinstance(config.curvature, int):
        raise ConfigError(
            "batches.curvature is a number: for a task in terms give a fraction, like 0.25, or null"
        )
    gradient = _role(config, terms, 1.0, step, rank, world_size)
    curvature = gradient
    if isinstance(config.curvature, float) and config.curvature < 1.0:
        curvature = _role(config, terms, config.curvature, step, rank, world_size)
    return StepPlan(gradient=gradient, curvature=curvature, line_search=gradient)


def _role(
    config: BatchesConfig,
    terms: Sequence[TermSize],
    fraction: float,
    step: int,
    rank: int,
    world_size: int,
) -> RolePlan:
    mine: list[MicrobatchPlan] = []
    number = total = 0
    for k, term in enumerate(terms):
        n = math.ceil(fraction * term.num_points)
        total += n
        indices, size = torch.arange(n), term.microbatch or config.microbatch
        pieces = indices.split(size) if size else indices.tensor_split(world_size)
        for piece in pieces:
            # The ranks take turns over all terms: small ones do not all fall to the first.
            if number % world_size == rank and len(piece):
                draw = step if term.every_step else 0
                mine.append(MicrobatchPlan(number=number, indices=piece, term=k, draw=draw))
            number += 1
    return RolePlan(microbatches=tuple(mine), num_examples=total)
