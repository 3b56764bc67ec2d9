"""What a solve's directions say of the metric's blocks, beside the definition."""

from __future__ import annotations

import math

import pytest
import torch
from test_preconditioner_table import problem_of
from torch import Tensor

from hfdist.curvature.kronecker.blocks import MOST_RELATIVE, _Damping
from hfdist.curvature.kronecker.ratios import KEPT, MOST, CurvatureRatios
from hfdist.curvature.kronecker.statistics import Sampling, take_statistics
from hfdist.curvature.objective import Problem


def directions(problem: Problem, number: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(u, Bu, Cu) with positive definite B and C."""
    generator = torch.Generator().manual_seed(seed)
    n = problem.numel
    B, C = (torch.randn(n, n, generator=generator).double() for _ in range(2))
    B, C = B @ B.T, C @ C.T
    return [(u, B @ u, C @ u) for u in torch.randn(number, n, generator=generator).double()]


def expected(problem: Problem, seen: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """log(r_l / median over matrices) [parameters], written out."""
    logs = []
    for (a, b), _ in zip(problem.params.spans, problem.params.tensors):
        curvature = sum(float(u[a:b] @ Bu[a:b]) for u, Bu, _ in seen)
        own = sum(float(u[a:b] @ Cu[a:b]) for u, _, Cu in seen)
        logs.append(math.log(curvature / own) if min(curvature, own) > 0 else math.nan)
    matrices = sorted(
        x for x, t in zip(logs, problem.params.tensors) if t.ndim > 1 and not math.isnan(x)
    )
    middle = matrices[(len(matrices) - 1) // 2]
    return (
        torch.tensor([0.0 if math.isnan(x) else x - middle for x in logs])
        .double()
        .clamp(-MOST, MOST)
    )


def test_are_those_of_the_definition_averaged_over_solves() -> None:
    problem = problem_of("conv", "none")
    ratios = CurvatureRatios()
    assert ratios.begin(problem) is None
    first, second = directions(problem, 4), directions(problem, 3, seed=1)
    for direction in first:
        problem.see(*direction)
    one = ratios.begin(problem)
    assert one is not None
    torch.testing.assert_close(one.log(), (1 - KEPT) * expected(problem, first))
    for direction in second:
        problem.see(*direction)
    two = ratios.begin(problem)
    assert two is not None
    torch.testing.assert_close(two.log(), KEPT * one.log() + (1 - KEPT) * expected(problem, second))
    again = ratios.begin(problem)  # a step without a solve says nothing new
    assert again is not None
    assert torch.equal(again, two)


def test_of_a_loss_of_other_size_are_the_same() -> None:
    problem = problem_of("conv", "none")
    found = []
    for factor in (1.0, 1e3):
        ratios = CurvatureRatios()
        ratios.begin(problem)
        for u, Bu, Cu in directions(problem, 3):
            problem.see(u, factor * Bu, factor * Cu)
        found.append(ratios.begin(problem))
    assert None not in found
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf])
def test_blocks_that_say_nothing_are_in_the_middle(bad: float) -> None:
    problem = problem_of("conv", "none")
    ratios = CurvatureRatios()
    ratios.begin(problem)
    a, b = problem.params.spans[0]
    u = directions(problem, 1)[0][0]
    Bu = u.clone()
    Bu[a:b] *= bad
    problem.see(u, Bu, u)
    found = ratios.begin(problem)
    assert found is not None
    torch.testing.assert_close(found, torch.ones_like(found))


def test_go_on_from_a_checkpoint() -> None:
    problem = problem_of("conv", "none")
    ratios = CurvatureRatios()
    ratios.begin(problem)
    for direction in directions(problem, 4):
        problem.see(*direction)
    kept, resumed = ratios.copy(), CurvatureRatios()
    resumed.load_state_dict(ratios.state_dict())
    found = [each.begin(problem) for each in (ratios, kept, resumed)]
    assert found[0] is not None
    for each in found[1:]:
        assert each is not None
        assert torch.equal(each, found[0])


def test_begin_anew_where_other_parameters_are_trained() -> None:
    ratios = CurvatureRatios()
    problem = problem_of("conv", "none")
    ratios.begin(problem)
    problem.see(*directions(problem, 1)[0])
    assert ratios.begin(problem) is not None
    assert ratios.begin(problem_of("lstm", "none")) is None


def test_multiply_what_the_metric_adds_to_a_blocks_factors() -> None:
    problem = problem_of("linear-mse", "none")
    problem.loss_and_gradient()
    plan, statistics, _ = take_statistics(problem, Sampling())
    relative = 0.1
    ratios = torch.ones(len(problem.params.tensors)).double()

    def matrices(number: int, ratios: Tensor | None, relative: float = relative) -> list[Tensor]:
        damping = _Damping(problem, None, relative, ratios)
        return damping.parts(plan, statistics)[number].matrices

    number = 0
    index = plan.layers[number].keys[0].rows.index
    bare, plain = matrices(number, None, 0.0), matrices(number, None)
    for factor in (0.01, 5.0, 1e6):
        ratios[index] = factor
        times = min(relative * factor, MOST_RELATIVE) / relative
        for none, one, many in zip(bare, plain, matrices(number, ratios)):
            torch.testing.assert_close(many - none, times * (one - none), rtol=1e-6, atol=1e-12)
        for one, other in zip(matrices(1, None), matrices(1, ratios)):
            assert torch.equal(one, other)
