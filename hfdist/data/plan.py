"""Which examples a step sees, and who evaluates them: a pure function of (seed, step, rank, world size).

The examples of a step and their cut into microbatches are global; ranks take whole microbatches. So a
resumed run sees what the undisturbed one sees, and the number of ranks may change in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from hfdist.comm.balance import balanced
from hfdist.data.config import BatchesConfig
from hfdist.errors import DataError
from hfdist.seeds import mixed


@dataclass(frozen=True, kw_only=True, eq=False)
class MicrobatchPlan:
    """Examples of one forward pass."""

    number: int
    """Place on the step's grid; seeds its random numbers."""
    indices: Tensor
    """Places in the data set, or in the term's points, int64 [n]."""
    term: int | None = None
    """Of data in terms (see `hfdist.data.points`): which one."""
    draw: int = 0
    """Number of the draw of its points."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RolePlan:
    """This rank's part of a role."""

    microbatches: tuple[MicrobatchPlan, ...]
    num_examples: int
    """Over all ranks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """This rank's work of a step; the same object in two roles means the same examples."""

    gradient: RolePlan
    curvature: RolePlan
    line_search: RolePlan
    num_read: int = 0
    """Of a stream: examples that this rank reads for the step."""

    def microbatches(self) -> list[MicrobatchPlan]:
        """What the step loads, in its order, each role once."""
        roles = [self.gradient]
        roles += [r for r in (self.curvature, self.line_search) if r is not self.gradient]
        return [microbatch for role in roles for microbatch in role.microbatches]


Costs = Sequence[float] | Tensor | None

_ENDLESS = 1 << 40
"""Stands for the length of a stream."""


def plan_step(
    config: BatchesConfig,
    *,
    num_examples: int | None,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    costs: Costs = None,
    curvature_share: float = 1.0,
) -> StepPlan:
    """Draw a step's examples and take this rank's share.

    Every pass over the data has an order of its own; a step takes the next examples of it, and a pass
    that is too short for the step is left for the next one.

    Args:
        config: Sizes of the roles.
        num_examples: Length of the data; None for a deterministic function, which rank 0 evaluates.
        seed, step, rank, world_size: What the plan is a function of.
        costs: Relative work of every example; ranks are then balanced by work instead of number.
        curvature_share: Of the gradient's examples, where `batches.curvature` is auto.

    Raises:
        DataError: A role is larger than the data.
    """
    if num_examples is None:
        nothing = MicrobatchPlan(number=0, indices=torch.empty(0, dtype=torch.int64))
        role = RolePlan(microbatches=(nothing,) if rank == 0 else (), num_examples=1)
        return StepPlan(gradient=role, curvature=role, line_search=role)
    sizes = _Sizes.of(config, num_examples, step)
    epoch, start = _epoch_and_offset(config, num_examples, step)
    order = _order(num_examples, seed, epoch)
    examples = order[start : start + sizes.drawn]

    def share(indices: Tensor) -> RolePlan:
        return _share(indices, config.microbatch, rank, world_size, costs)

    gradient = share(examples[: sizes.gradient])
    curvature = gradient
    num_curvature = sizes.curvature
    if config.curvature == "auto":
        num_curvature = min(
            sizes.gradient, max(world_size, round(curvature_share * sizes.gradient))
        )
    if num_curvature != sizes.gradient:
        curvature = share(examples[:num_curvature])
    line_search = gradient
    if sizes.line_search is not None:
        line_search = share(examples[len(examples) - sizes.line_search :])
    return StepPlan(gradient=gradient, curvature=curvature, line_search=line_search)


def plan_stream_step(
    config: BatchesConfig, *, step: int, rank: int, world_size: int, is_sharded: bool
) -> StepPlan:
    """Take this rank's share of the next examples of a stream.

    A microbatch's indices are places among the `num_read` examples that this rank reads for the step. Where
    every rank reads the whole stream, the step's examples and their cut into microbatches are global, as
    those of `plan_step`; where each reads its own part, the sizes of the roles are divided among the ranks.

    Args:
        config: Sizes of the roles; `gradient` is a number.
        step, rank, world_size: What the plan is a function of.
        is_sharded: Whether each rank reads its own part.
    """
    sizes = _Sizes.of(config, _ENDLESS, step)
    parts = [sizes.gradient, sizes.curvature, sizes.line_search or 0]
    if is_sharded:
        parts = [n // world_size + (rank < n % world_size) for n in parts]
    gradient, curvature, line_search = parts
    drawn = max(gradient, curvature)
    places = torch.arange(drawn + line_search)

    def share(indices: Tensor, total: int) -> RolePlan:
        if not is_sharded:
            return _share(indices, config.microbatch, rank, world_size, None)
        pieces = indices.split(config.microbatch or max(len(indices), 1))
        return RolePlan(
            microbatches=tuple(
                MicrobatchPlan(number=rank + world_size * k, indices=piece)
                for k, piece in enumerate(pieces)
                if len(piece)
            ),
            num_examples=total,
        )

    of_gradient = share(places[:gradient], sizes.gradient)
    of_curvature = of_line_search = of_gradient
    if sizes.curvature != sizes.gradient:
        of_curvature = share(places[:curvature], sizes.curvature)
    if sizes.line_search is not None:
        of_line_search = share(places[drawn:], sizes.line_search)
    return StepPlan(
        gradient=of_gradient,
        curvature=of_curvature,
        line_search=of_line_search,
        num_read=len(places),
    )


def gradient_examples(config: BatchesConfig, step: int) -> int:
    """Gradient examples of a step on a stream, over all ranks."""
    return _Sizes.of(config, _ENDLESS, step).gradient


def examples_until(config: BatchesConfig, step: int) -> int:
    """Gradient examples of the steps before `step` on a stream, over all ranks."""
    if config.growth == 1.0:
        return step * gradient_examples(config, 0)
    return sum(gradient_examples(config, s) for s in range(step))


def data_passes(config: BatchesConfig, num_examples: int | None, step: int) -> float:
    """Gradient examples of the steps before `step`, in passes over the data; steps for a function."""
    if num_examples is None:
        return float(step)
    if config.growth == 1.0:
        return step * _Sizes.of(config, num_examples, 0).gradient / num_examples
    return sum(_Sizes.of(config, num_examples, s).gradient for s in range(step)) / num_examples


# -- which examples ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    gradient: int
    curvature: int
    line_search: int | None  # None: the gradient's examples
    drawn: int

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(config: BatchesConfig, num_examples: int, step: int) -> _Sizes:
        def size(key: str, value: int | None) -> int:
            if value is None:
                return num_examples
            if value > num_examples:
                raise DataError(
                    f"batches.{key} is {value} but the training data has {num_examples} examples: "
                    f"lower it, or set it to null"
                )
            # A power too large for a float is more than all data, too.
            factor = math.inf if step * math.log(config.growth) > 700 else config.growth**step
            return min(
                num_examples, math.ceil(value * factor) if factor < math.inf else num_examples
            )

        gradient = size("gradient", config.gradient)
        if config.curvature is None or isinstance(config.curvature, str):
            curvature = gradient
        elif isinstance(config.curvature, float):
            curvature = max(1, round(config.curvature * gradient))
        else:
            curvature = size("curvature", config.curvature)
        line_search = None
        drawn = max(gradient, curvature)
        if config.line_search is not None:
            line_search = size("line_search", config.line_search)
            drawn = min(num_examples, drawn + line_search)
        return _Sizes(gradient, curvature, line_search, drawn)


def _epoch_and_offset(config: BatchesConfig, num_examples: int, step: int) -> tuple[int, int]:
    """(epoch, offset in it) of a step's first example."""
    if config.growth == 1.0:
        drawn = _Sizes.of(config, num_examples, 0).drawn
        per_epoch = num_examples // drawn
        return step // per_epoch, step % per_epoch * drawn
    return _growing_offset(config, num_examples, step)


@cache
def _growing_offset(config: BatchesConfig, num_examples: int, step: int) -> tuple[int, int]:
    epoch, start = 0, 0
    for s in range(step + 1):
        drawn = _Sizes.of(config, num_examples, s).drawn
        if start + drawn > num_examples:
            epoch, start = epoch + 1, 0
        if s < step:
            start += drawn
    return epoch, start


@lru_cache(maxsize=4)
def _order(num_examples: int, seed: int, epoch: int) -> Tensor:
    """Order of the examples in an epoch, int64 [N]."""
    generator = torch.Generator().manual_seed(mixed(seed, "order", epoch))
    return torch.randperm(num_examples, generator=generator)


# -- who evaluates them ------------------------------------------------------------------------------


def _share(
    indices: Tensor, microbatch: int | None, rank: int, world_size: int, costs: Costs
) -> RolePlan:
    n = len(indices)
    work = None if costs is None else torch.as_tensor(costs, dtype=torch.float64)[indices]
    if microbatch is None:
        if work is None:
            pieces = list(torch.tensor_split(indices, world_size))
        else:
            pieces = [indices[mine] for mine in balanced(work.tolist(), world_size)]
        mine = [(rank, pieces[rank])]
    else:
        if work is not None:  # examples of like cost together: less padding, evener microbatches
            by_cost = torch.argsort(work, descending=True, stable=True)
            indices, work = indices[by_cost], work[by_cost]
        pieces = list(indices.split(microbatch))
        if work is None:
            numbers = list(range(rank, len(pieces), world_size))
        else:
            totals = torch.stack([piece.sum() for piece in work.split(microbatch)])
            numbers = balanced(totals.tolist(), world_size)[rank]
        mine = [(number, pieces[number]) for number in numbers]
    return RolePlan(
        microbatches=tuple(
            MicrobatchPlan(number=number, indices=piece) for number, piece in mine if len(piece)
        ),
        num_examples=n,
    )
