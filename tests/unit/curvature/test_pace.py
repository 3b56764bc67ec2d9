"""How many steps share a metric, and that they share it to the bit, in a resumed run, too."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from test_preconditioner_table import probes, problem_of
from torch import Tensor

from hfdist.curvature.kronecker.pace import MOST, SHARE, YOUNG, Pace
from hfdist.curvature.kronecker.statistics import Sampling, take_statistics
from hfdist.curvature.preconditioners.memory import PreconditionerMemory

OLD = Pace(number=YOUNG)


def periods(cost: float, work: float, steps: int = 100) -> list[int]:
    """Steps that shared each metric, the young ones left out."""
    pace, found = OLD, [0]
    for _ in range(steps):
        if pace.is_due("auto", 1.0):
            pace = pace.renewed(cost, 1.0)
            found.append(1)
        else:
            pace = pace.shared()
            found[-1] += 1
        pace = pace.after(work, accepted=True)
    return found[1:-1]


def test_one_that_takes_little_of_a_step_is_not_shared() -> None:
    assert set(periods(cost=1.9 * SHARE, work=1.0)) == {1}


@pytest.mark.parametrize("cost", [0.25, 0.4, 0.75, 1.5])
def test_one_that_takes_more_takes_about_a_tenth_of_the_steps_that_share_it(cost: float) -> None:
    (period,) = set(periods(cost, work=1.0))
    assert period > 1
    assert SHARE <= cost / period < SHARE * (1 + 1 / (period - 1))


def test_no_metric_serves_longer_than_the_bound() -> None:
    assert set(periods(cost=1e3, work=1.0)) == {MOST}


def test_what_makes_a_new_one_due_at_once() -> None:
    shared = OLD.renewed(100.0, 0.1).after(1.0, accepted=True)
    assert not shared.is_due("auto", 0.1)
    assert not shared.is_due("auto", 0.9)
    assert shared.is_due("auto", 1.1)  # another lambda
    assert shared.is_due("auto", 0.009)
    assert shared.after(1.0, accepted=False).is_due("auto", 0.1)
    assert dataclasses.replace(shared, number=YOUNG - 1).is_due("auto", 0.1)
    assert OLD.renewed(100.0, 0.1).is_due("auto", 0.1)  # nobody said what the step took
    assert not dataclasses.replace(shared, accepted=False, age=3).is_due(4, 1e9)
    assert dataclasses.replace(shared, age=4).is_due(4, 0.1)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_cost_is_that_of_the_matrix_products(share: float) -> None:
    """linear-mse, written out; a share looks at fewer uses, and inverts as much."""
    problem = problem_of("linear-mse", "none")
    problem.loss_and_gradient()
    _, statistics, _ = take_statistics(problem, Sampling(share=share))
    layers = [t.shape for t in problem.params.tensors if t.ndim == 2]
    examples = problem.gradient_weight
    gradient = sum(6.0 * examples * out * inputs for out, inputs in layers)
    looked_at = sum(
        4.0 * out * inputs + 2.0 * (inputs + 1) ** 2 + 2.0 * out**2 for out, inputs in layers
    )
    inverses = sum(2.0 * (inputs + 1) ** 3 + 2.0 * out**3 for out, inputs in layers)
    if share == 1.0:
        expected = (looked_at * examples + inverses) / gradient
        assert statistics.cost == pytest.approx(expected)
    else:
        number = (statistics.cost * gradient - inverses) / looked_at  # of the examples
        assert number == pytest.approx(round(number))
        assert 0 < number <= examples


def metric(memory: PreconditionerMemory, work: float = 1e-3, **changes: Any) -> tuple[Tensor, bool]:
    """M of a step [probes, P], and whether statistics were taken for it."""
    problem = problem_of("conv", changes.pop("name", "kfac"), memory=memory, **changes)
    problem.loss_and_gradient()
    M = problem.preconditioner(None)
    assert M is not None
    found = torch.stack([M(v).clone() for v in probes(problem.numel)])
    for v in probes(problem.numel):  # what a solve would see
        if problem.see is not None:
            problem.see(v, 2.0 * v, v * torch.arange(len(v)).to(v))
    memory.after(work, accepted=True)
    return found, problem.costs.metric > 0.0


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_steps_share_it_to_the_bit(name: str) -> None:
    """Also where the ratios of the blocks are others by now."""
    memory = PreconditionerMemory()
    found = [metric(memory, name=name) for _ in range(YOUNG + 3)]
    assert [is_new for _, is_new in found] == [True] * YOUNG + [False] * 3
    for M, _ in found[YOUNG:]:
        assert torch.equal(M, found[YOUNG - 1][0])
    assert not torch.equal(found[0][0], found[YOUNG - 1][0])


def test_a_number_of_steps_shares_inverses_too() -> None:
    memory = PreconditionerMemory()
    found = [metric(memory, preconditioner_refresh=2) for _ in range(4)]
    assert [is_new for _, is_new in found] == [True, False, True, False]
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[1][0], found[2][0])


def test_every_step_has_its_own_where_work_is_large_beside_it() -> None:
    memory = PreconditionerMemory()
    assert all(metric(memory, work=1e6)[1] for _ in range(YOUNG + 3))


def test_a_solver_that_damps_the_preconditioner_has_a_new_one_each_step() -> None:
    memory = PreconditionerMemory()
    for _ in range(YOUNG + 2):
        problem = problem_of("conv", "kfac", memory=memory)
        problem.loss_and_gradient()
        problem.preconditioner(0.3)
        memory.after(1e-3, accepted=True)
        assert problem.costs.metric > 0.0


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("steps", [YOUNG, YOUNG + 2])
def test_a_resumed_run_shares_the_same_bits(name: str, steps: int) -> None:
    memory = PreconditionerMemory()
    for _ in range(steps):
        metric(memory, name=name)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    resumed = PreconditionerMemory()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for work in (1e-3, 1e6, 1e6):
        (M, is_new), (again, is_new_again) = (
            metric(own, work=work, name=name) for own in (memory, resumed)
        )
        assert is_new == is_new_again
        assert torch.equal(M, again)


def test_an_abandoned_step_leaves_nothing() -> None:
    memory = PreconditionerMemory()
    for _ in range(YOUNG + 1):
        metric(memory)
    before = memory.copy()
    memory.after(1e6, accepted=True)  # a new one is due
    assert metric(memory)[1]
    M, is_new = metric(before)
    assert not is_new
    assert not torch.equal(M, metric(memory)[0])
