"""How often a problem evaluates its microbatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hfdist.curvature.microbatch import Evaluation, Microbatch
from hfdist.curvature.objective import Problem


def passes_of(problem: Problem) -> list[Microbatch]:
    """A list that gets a line with every forward pass from now on."""
    passes: list[Microbatch] = []

    def counted(microbatch: Microbatch) -> Microbatch:
        evaluate: Callable[..., Evaluation] = microbatch.evaluate

        def counting(*args: Any) -> Evaluation:
            passes.append(microbatch)
            return evaluate(*args)

        return replace(microbatch, evaluate=counting)

    roles = problem.roles
    for role in {id(r): r for r in (roles.gradient, roles.curvature, roles.loss)}.values():
        assert isinstance(role, list)
        role[:] = [counted(microbatch) for microbatch in role]
    return passes
