"""A step's objective stands still: masks, statistics, generators."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, named, rows
from torch import Tensor, nn

from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_closure, from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.verify import Verifier
from hfdist.optim.options import HFOptions
from hfdist.optim.step import HFState, hf_step


def problem_of(case: Case, model: nn.Module, seed: int = 3, sizes: Any = (6,)) -> Problem:
    batch, low, role = case.data(), 0, []
    for size in sizes:
        role.append(from_task(case.task(), model, rows(batch, low, low + size), seed + low))
        low += size
    return Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        reduction="mean",
        frozen=FixedRandomness(torch.device("cpu"), model),
    )


RANDOM = pytest.mark.parametrize("name", ["dropout", "encoder-dropout"])


@RANDOM
def test_every_evaluation_sees_the_same_masks(name: str) -> None:
    case = named([name])[0]
    model = case.model()
    problem = problem_of(case, model)
    loss, g = problem.loss_and_gradient()
    nothing = torch.zeros_like(g)
    torch.rand(7)  # whatever the user draws in between
    assert problem.losses([(1.0, nothing), (0.5, nothing)]) == [pytest.approx(loss, rel=1e-14)] * 2
    # The gradient is that of the very function that losses evaluate.
    d = torch.randn(len(g), dtype=g.dtype, generator=torch.Generator().manual_seed(1))
    up, down = problem.losses([(1e-6, d), (-1e-6, d)])
    assert (up - down) / 2e-6 == pytest.approx(float(g @ d), rel=1e-6)
    # So is the Hessian, and the GGN belongs to the same masks.
    assert torch.equal(problem.curvature()(d).clone(), problem.curvature()(d))
    assert problem_of(case, model).loss_and_gradient()[0] == loss
    assert problem_of(case, model, seed=4).loss_and_gradient()[0] != loss, "another step"


@RANDOM
def test_a_closures_masks_are_frozen_too(name: str) -> None:
    case = named([name])[0]
    model, batch, task = case.model(), case.data(), case.task()

    def forward() -> tuple[Tensor, Tensor]:
        outputs = task.forward(model, batch)
        value = task.loss(outputs, batch)
        return (value[0] / value[1] if isinstance(value, tuple) else value), outputs

    role = [from_closure(forward, seed=2)]
    problem = Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
    )
    loss, g = problem.loss_and_gradient()
    assert problem.losses([(1.0, torch.zeros_like(g))])[0] == pytest.approx(loss, rel=1e-14)


@pytest.mark.parametrize("name", ["dropout", "batch-norm-train", "lstm"])
def test_the_global_generator_is_untouched(name: str) -> None:
    case = named([name])[0]
    problem = problem_of(case, case.model())
    torch.manual_seed(42)
    state = torch.get_rng_state()
    hf_step(problem, HFState(damping=1.0), HFOptions(cg_max_iter=5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sizes", [(6,), (4, 2)], ids=["whole", "microbatched"])
@pytest.mark.parametrize("name", ["batch-norm-train", "residual-train"])
def test_batch_norm_statistics_move_once_a_step(name: str, sizes: tuple[int, ...]) -> None:
    case = named([name])[0]
    model = case.model()
    before = copy.deepcopy(model)
    problem = problem_of(case, model, sizes=sizes)
    report, _ = hf_step(problem, HFState(damping=1.0), HFOptions(cg_max_iter=8))
    assert report.accepted
    # As the forward passes of the gradient move them from the step's start; weighted by examples.
    expected = {k: torch.zeros_like(b, dtype=torch.float64) for k, b in before.named_buffers()}
    low = 0
    for size in sizes:
        once = copy.deepcopy(before)
        case.task().forward(once, rows(case.data(), low, low + size))
        for key, buffer in once.named_buffers():
            expected[key] += buffer.double() * size / 6
        low += size
    assert any("num_batches_tracked" in key for key in expected)
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(buffer.double(), expected[key], rtol=1e-12, atol=1e-12)


def test_a_rejected_step_leaves_the_statistics_alone() -> None:
    case = named(["batch-norm-train"])[0]
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    options = HFOptions(cg_max_iter=3, lr=1e30, linesearch_max_iter=1, use_cg_backtracking=False)
    report, _ = hf_step(problem_of(case, model), HFState(damping=1.0), options)
    assert not report.accepted
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_statistics_are_back_after_an_exception_in_a_forward_pass() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    frozen = FixedRandomness(torch.device("cpu"), model)

    def fail_late() -> None:
        with frozen.evaluation(0):
            model(x)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_late()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_modules_of_a_closure_are_found_while_they_run() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    before = model[1].running_mean.clone()
    calls = 0

    def forward() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        outputs = model(x)
        return nn.functional.cross_entropy(outputs, y), outputs

    role = [from_closure(forward, seed=0)]
    problem = Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        engine=ProductEngine(verifier=Verifier(mode="off")),
    )
    _, g = problem.loss_and_gradient()
    problem.losses([(0.1, g), (0.2, g)])
    assert calls == 3
    assert torch.equal(model[1].running_mean, before)
    problem.move(0.0, g)
    assert not torch.equal(model[1].running_mean, before)
    assert int(model[1].num_batches_tracked) == 1
