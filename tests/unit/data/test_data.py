"""Batches as a pure function: every example once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

from hfdist.data.config import BatchesConfig
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import MicrobatchPlan, StepPlan, data_passes, plan_step
from hfdist.errors import DataError
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.task import Task

configs = st.builds(
    BatchesConfig,
    gradient=st.none() | st.integers(1, 30),
    curvature=st.none() | st.integers(1, 30) | st.floats(0.01, 1.0),
    line_search=st.none() | st.integers(1, 30),
    microbatch=st.none() | st.integers(1, 12),
    growth=st.sampled_from([1.0, 1.3]),
)


def plans(
    config: BatchesConfig, world_size: int, step: int, n: int = 30, **changes: Any
) -> list[StepPlan]:
    return [
        plan_step(
            config, num_examples=n, seed=5, step=step, rank=r, world_size=world_size, **changes
        )
        for r in range(world_size)
    ]


def taken(steps: Sequence[StepPlan], role: str) -> list[int]:
    """Examples of a role over all ranks, sorted."""
    return sorted(
        i for plan in steps for m in getattr(plan, role).microbatches for i in m.indices.tolist()
    )


@given(configs, st.integers(1, 6), st.integers(0, 40))
def test_every_example_is_evaluated_once_whatever_the_world_size(
    config: BatchesConfig, world_size: int, step: int
) -> None:
    alone = plans(config, 1, step)
    ranks = plans(config, world_size, step)
    for role in ("gradient", "curvature", "line_search"):
        examples = taken(alone, role)
        assert taken(ranks, role) == examples
        assert len(set(examples)) == len(examples)
        assert {getattr(p, role).num_examples for p in ranks} == {len(examples)}
    assert set(taken(alone, "curvature")) <= set(taken(alone, "gradient")) or (
        set(taken(alone, "gradient")) <= set(taken(alone, "curvature"))
    )
    for plan in ranks:
        assert (plan.curvature is plan.gradient) == (
            taken(ranks, "curvature") == taken(ranks, "gradient")
        )


@given(configs, st.integers(1, 6), st.integers(0, 20))
def test_a_plan_depends_on_nothing_else(config: BatchesConfig, world_size: int, step: int) -> None:
    torch.manual_seed(step)
    for a, b in zip(plans(config, world_size, step), plans(config, world_size, step)):
        assert [(m.number, m.indices.tolist()) for m in a.gradient.microbatches] == [
            (m.number, m.indices.tolist()) for m in b.gradient.microbatches
        ]


@given(st.integers(1, 12), st.integers(1, 5))
def test_the_grid_of_microbatches_is_global(microbatch: int, world_size: int) -> None:
    config = BatchesConfig(gradient=25, microbatch=microbatch)

    def grid(W: int) -> dict[int, list[int]]:
        found = [m for plan in plans(config, W, 3) for m in plan.gradient.microbatches]
        assert len({m.number for m in found}) == len(found)
        assert all(len(m.indices) <= microbatch for m in found)
        return {m.number: m.indices.tolist() for m in found}

    assert grid(world_size) == grid(1)


def test_a_pass_takes_each_example_once_before_any_twice() -> None:
    config = BatchesConfig(gradient=10)
    first = [i for step in range(3) for i in taken(plans(config, 1, step), "gradient")]
    second = [i for step in range(3, 6) for i in taken(plans(config, 1, step), "gradient")]
    assert sorted(first) == sorted(second) == list(range(30))
    orders = [plans(config, 1, s)[0].gradient.microbatches[0].indices.tolist() for s in (0, 3)]
    assert orders[0] != orders[1]


def test_growth_reaches_all_data() -> None:
    config = BatchesConfig(gradient=4, growth=1.5)
    sizes = [plans(config, 1, step)[0].gradient.num_examples for step in range(8)]
    assert sizes == [4, 6, 9, 14, 21, 30, 30, 30]
    assert data_passes(config, 30, 3) == pytest.approx((4 + 6 + 9) / 30)


@pytest.mark.parametrize("world_size", [2, 4, 7])
@pytest.mark.parametrize("microbatch", [None, 8])
def test_ranks_are_balanced_by_work(world_size: int, microbatch: int | None) -> None:
    n = 2000
    costs = torch.rand(n, generator=torch.Generator().manual_seed(1)).pow(3) * 500 + 1  # skewed
    config = BatchesConfig(microbatch=microbatch)
    work = [
        sum(float(costs[m.indices].sum()) for m in plan.gradient.microbatches)
        for plan in plans(config, world_size, 0, n=n, costs=costs)
    ]
    assert max(work) / (sum(work) / world_size) <= 1.05


def test_a_function_without_data_is_evaluated_by_the_lead() -> None:
    steps = [
        plan_step(BatchesConfig(), num_examples=None, seed=0, step=0, rank=r, world_size=3)
        for r in range(3)
    ]
    assert [len(p.gradient.microbatches) for p in steps] == [1, 0, 0]


@pytest.mark.parametrize("role", ["gradient", "curvature", "line_search"])
def test_a_role_larger_than_the_data_is_named(role: str) -> None:
    with pytest.raises(DataError, match=rf"batches\.{role} is 31 .* 30 examples"):
        plans(BatchesConfig(**{role: 31}), 1, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("gradient", 0), ("curvature", 0.0), ("curvature", 1.5), ("microbatch", -1), ("growth", 0.9)],
)
def test_a_bad_size_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        BatchesConfig(**{key: value})


# -- loading


class Pairs(Dataset[Any]):
    """Counts what is asked for."""

    def __init__(self, bad: int = -1) -> None:
        self.asked: list[int] = []
        self.bad = bad

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.asked.append(index)
        if index == self.bad:
            raise ZeroDivisionError("no such picture")
        return torch.full((index % 3 + 1,), float(index)), index


class Padded(Task):
    def model(self) -> nn.Module:
        return nn.Identity()

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return outputs.sum()

    def collate(self, examples: Sequence[Any]) -> Any:
        values = nn.utils.rnn.pad_sequence([e[0] for e in examples], batch_first=True)
        return {"values": values, "labels": torch.tensor([e[1] for e in examples])}


class Plain(Padded):
    collate = Task.collate


def loader(task: Task, data: Any, dtype: torch.dtype = torch.float64) -> BatchLoader:
    return BatchLoader(task, data, torch.device("cpu"), dtype)


def plan(*indices: int, number: int = 0) -> MicrobatchPlan:
    return MicrobatchPlan(number=number, indices=torch.tensor(indices))


def test_batches_are_collated_and_cast() -> None:
    batch = loader(Padded(), Pairs()).load(plan(1, 2))
    assert batch["values"].dtype == torch.float64
    assert batch["labels"].dtype == torch.int64
    assert batch["values"].tolist() == [[1, 1, 0], [2, 2, 2]]


def test_only_what_is_asked_for_is_read_and_prefetched_once() -> None:
    data = Pairs()
    made = loader(Padded(), data)
    made.prefetch([plan(4, 5), plan(6, number=1)])
    assert made.load(plan(6, number=1))["labels"].tolist() == [6]
    assert made.load(plan(4, 5))["labels"].tolist() == [4, 5]
    made.close()
    assert data.asked == [4, 5, 6]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_broken_example_is_named(ahead: bool) -> None:
    made = loader(Padded(), Pairs(bad=7))
    if ahead:
        made.prefetch([plan(6, 7)])
    with pytest.raises(DataError, match=r"Pairs\[7\] fails: ZeroDivisionError: no such picture"):
        made.load(plan(6, 7))
    made.close()


def test_what_cannot_be_stacked_says_how() -> None:
    with pytest.raises(DataError, match="collate"):
        loader(Plain(), Pairs()).load(plan(0, 1))


def test_array_data_gives_tuples_and_dicts() -> None:
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    batch = loader(Plain(), ArrayData(x, y), torch.float32).load(plan(2, 0))
    assert batch[0].tolist() == [[4, 5], [0, 1]]
    named = loader(Plain(), ArrayData(inputs=x, labels=y)).load(plan(1))
    assert set(named) == {"inputs", "labels"}
    with pytest.raises(ValueError, match="same number"):
        ArrayData(x, y[:2])
