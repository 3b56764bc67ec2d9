"""Which examples a step sees, and who evaluates them: a pure function of (seed, step, rank, world size).

The examples of a step and their cut into microbatches are global; ranks take whole microbatches. So a
resumed run sees what the undisturbed one sees, and the number of ranks may change in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from hfdist.errors import DataError, UserError
from hfdist.seeds import mixed
from hfdist.tasks.task import Batch, Task


@dataclass(frozen=True, kw_only=True)
class BatchesConfig:
    """Examples of a step by role [Martens & Sutskever 2012, sec. 12], over all ranks.

    Raises:
        ValueError: A value is out of its range; the message names the key and the range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    gradient: int | None = None
    """Examples of the gradient; null: all training data."""
    curvature: int | float | None = None
    """Examples of the curvature products: a number, or a fraction (0.25) of the gradient's. Those are the
    first of the gradient's examples. null: the gradient's."""
    line_search: int | None = None
    """Examples of backtracking and line search, none of them the gradient's where the data allows; null:
    the gradient's."""
    microbatch: int | None = None
    """Examples of a forward pass; bounds the memory. Random numbers (dropout) belong to a microbatch, so
    with this set they do not depend on the number of workers. null: one microbatch a worker."""
    growth: float = 1.0
    """Factor by which the numbers of examples grow with every step, up to all data."""

    def __post_init__(self) -> None:
        for key in ("gradient", "line_search", "microbatch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}: it must be at least 1, or null")
        c = self.curvature
        if isinstance(c, float) and not 0.0 < c <= 1.0:
            raise ValueError(f"curvature is {c}: a fraction must be above 0 and at most 1")
        if isinstance(c, int) and c < 1:
            raise ValueError(f"curvature is {c}: it must be at least 1, or null")
        if not 1.0 <= self.growth < math.inf:
            raise ValueError(f"growth is {self.growth}: it must be at least 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class MicrobatchPlan:
    """Examples of one forward pass."""

    number: int
    """Place on the step's grid; seeds its random numbers."""
    indices: Tensor
    """Places in the data set, int64 [n]."""


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


Costs = Sequence[float] | Tensor | None


def plan_step(
    config: BatchesConfig,
    *,
    num_examples: int | None,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    costs: Costs = None,
) -> StepPlan:
    """Draw a step's examples and take this rank's share.

    Every pass over the data has an order of its own; a step takes the next examples of it, and a pass
    that is too short for the step is left for the next one.

    Args:
        config: Sizes of the roles.
        num_examples: Length of the data; None for a deterministic function, which rank 0 evaluates.
        seed, step, rank, world_size: What the plan is a function of.
        costs: Relative work of every example; ranks are then balanced by work instead of number.

    Raises:
        DataError: A role is larger than the data.
    """
    if num_examples is None:
        nothing = MicrobatchPlan(number=0, indices=torch.empty(0, dtype=torch.int64))
        role = RolePlan(microbatches=(nothing,) if rank == 0 else (), num_examples=1)
        return StepPlan(gradient=role, curvature=role, line_search=role)
    sizes = _Sizes.of(config, num_examples, step)
    taken, start = _place(config, num_examples, step)
    order = _order(num_examples, seed, taken)
    examples = order[start : start + sizes.drawn]

    def share(indices: Tensor) -> RolePlan:
        return _share(indices, config.microbatch, rank, world_size, costs)

    gradient = share(examples[: sizes.gradient])
    curvature = gradient
    if sizes.curvature != sizes.gradient:
        curvature = share(examples[: sizes.curvature])
    line_search = gradient
    if sizes.line_search is not None:
        line_search = share(examples[len(examples) - sizes.line_search :])
    return StepPlan(gradient=gradient, curvature=curvature, line_search=line_search)


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
        if config.curvature is None:
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


def _place(config: BatchesConfig, num_examples: int, step: int) -> tuple[int, int]:
    """(pass over the data, place in it) of a step's first example."""
    if config.growth == 1.0:
        drawn = _Sizes.of(config, num_examples, 0).drawn
        per_pass = num_examples // drawn
        return step // per_pass, step % per_pass * drawn
    return _growing_place(config, num_examples, step)


@cache
def _growing_place(config: BatchesConfig, num_examples: int, step: int) -> tuple[int, int]:
    done, start = 0, 0
    for s in range(step + 1):
        drawn = _Sizes.of(config, num_examples, s).drawn
        if start + drawn > num_examples:
            done, start = done + 1, 0
        if s < step:
            start += drawn
    return done, start


@lru_cache(maxsize=4)
def _order(num_examples: int, seed: int, taken: int) -> Tensor:
    """Order of the examples in a pass over the data, int64 [N]."""
    generator = torch.Generator().manual_seed(mixed(seed, "order", taken))
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
            pieces = [indices[places] for places in _balanced(work, world_size)]
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
            numbers = _balanced(totals, world_size)[rank].tolist()
        mine = [(number, pieces[number]) for number in numbers]
    return RolePlan(
        microbatches=tuple(
            MicrobatchPlan(number=number, indices=piece) for number, piece in mine if len(piece)
        ),
        num_examples=n,
    )


def _balanced(work: Tensor, world_size: int) -> list[Tensor]:
    """Places for each rank, of nearly equal work: the longest first, to the least loaded rank
    (Graham 1969); places are ascending."""
    import heapq

    heap = [(0.0, rank) for rank in range(world_size)]
    places: list[list[int]] = [[] for _ in range(world_size)]
    values = work.tolist()
    for place in torch.argsort(work, descending=True, stable=True).tolist():
        load, rank = heapq.heappop(heap)
        places[rank].append(place)
        heapq.heappush(heap, (load + values[place], rank))
    return [torch.tensor(sorted(p), dtype=torch.int64) for p in places]


# -- data --------------------------------------------------------------------------------------------


class ArrayData(Dataset[Any]):
    """Examples in tensors with a common leading axis: a data set that gives whole batches at once.

    Args:
        tensors: One tensor a part of an example; or tensors by name, for batches that are dicts.
    """

    def __init__(self, *tensors: Tensor, **named: Tensor) -> None:
        self._parts: tuple[Tensor, ...] | dict[str, Tensor] = named if named else tensors
        sizes = {len(t) for t in (*tensors, *named.values())}
        if len(sizes) != 1:
            raise ValueError(
                f"the tensors have {sorted(sizes)} examples: they must have the same number"
            )
        self._length = sizes.pop()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self.batch(index)

    def batch(self, indices: Any) -> Batch:
        """The examples at `indices`, stacked."""
        if isinstance(self._parts, Mapping):
            return {name: t[indices] for name, t in self._parts.items()}
        return tuple(t[indices] for t in self._parts)


class BatchLoader:
    """Makes batches on the device; the next step's in the background.

    Args:
        task: Its `collate` makes batches of examples.
        dataset: Map-style; None for a deterministic function, whose batches are None.
        device: Where batches go; from pinned memory and without waiting, where it is a GPU.
        dtype: Type of floating-point leaves.
    """

    def __init__(
        self, task: Task, dataset: Dataset | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._task, self._dataset, self._device, self._dtype = task, dataset, device, dtype
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[tuple[int, bytes], Future[Batch]] = {}
        whole = type(task).collate is Task.collate and hasattr(dataset, "batch")
        self._whole_batches = whole

    def load(self, plan: MicrobatchPlan) -> Batch:
        """The batch of a plan.

        Raises:
            DataError: The data set fails on an example, or the task cannot make a batch.
        """
        coming = self._coming.pop(_key(plan), None)
        return self._make(plan) if coming is None else coming.result()

    def prefetch(self, plans: Sequence[MicrobatchPlan]) -> None:
        """Begin to make these batches; what is not loaded until the next call is dropped."""
        if self._dataset is None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="hfdist-data")
        for future in self._coming.values():
            future.cancel()
        self._coming = {_key(plan): self._pool.submit(self._make, plan) for plan in plans}

    def close(self) -> None:
        """End the background thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._coming = {}

    def _make(self, plan: MicrobatchPlan) -> Batch:
        if self._dataset is None:
            return None
        on_gpu = self._device.type == "cuda"

        def to_device(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dtype = self._dtype if leaf.is_floating_point() else leaf.dtype
            if on_gpu and leaf.device.type == "cpu":
                return leaf.to(dtype).pin_memory().to(self._device, non_blocking=True)
            return leaf.to(self._device, dtype)

        return tree_map(to_device, self._on_host(plan.indices))

    def _on_host(self, indices: Tensor) -> Batch:
        data: Any = self._dataset
        if self._whole_batches:
            return data.batch(indices)
        examples = []
        for index in indices.tolist():
            try:
                examples.append(data[index])
            except UserError:
                raise
            except Exception as error:
                raise DataError(
                    f"{type(data).__name__}[{index}] fails: {type(error).__name__}: {error}"
                ) from error
        try:
            return self._task.collate(examples)
        except UserError:
            raise
        except Exception as error:
            raise DataError(
                f"{type(self._task).__name__}.collate cannot make a batch of {len(examples)} examples: "
                f"{type(error).__name__}: {error}. Override collate() to pad or to stack them"
            ) from error


def _key(plan: MicrobatchPlan) -> tuple[int, bytes]:
    return plan.number, plan.indices.numpy().tobytes()
