"""The solver without products: lengths along the preconditioned gradient, chosen by the losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfdist import HessianFree
from hfdist.optim.options import HFOptions
from hfdist.optim.report import Stop
from hfdist.optim.solvers import SOLVERS, Solution, System

n = 8


def spd(seed: int) -> Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / n + 0.3 * torch.eye(n, dtype=torch.float64)


def solve(C: Tensor | None, b: Tensor, damping: float, **changes: Any) -> Solution:
    def no_product(shift: float) -> Any:
        raise AssertionError("the metric's step asks for no product")

    inverse = None if C is None else C.inverse()
    given = System(
        curvature=no_product,
        exact_curvature=no_product,
        b=b,
        damping=damping,
        preconditioner=lambda _: None if inverse is None else inverse.mv,
        **changes,
    )
    return SOLVERS["metric"](given, HFOptions(solver="metric"))


def test_its_steps_are_newtons_in_the_metric_of_several_lengths() -> None:
    C, b = spd(0), torch.ones(n, dtype=torch.float64)
    solution = solve(C, b, 0.5)
    newton = torch.linalg.solve(C, b)
    dampings = [candidate.damping for candidate in solution.candidates]
    assert dampings == sorted(dampings, reverse=True)
    assert dampings[solution.centre] == 0.5
    for index, candidate in enumerate(solution.candidates):
        x = solution.step(index)
        torch.testing.assert_close(x, newton / candidate.damping)
        model = float(x @ C @ x / 2 - b @ x)
        assert candidate.undamped_model == pytest.approx(model, rel=1e-9)
        damped = float(candidate.damping * x @ C @ x / 2 - b @ x)
        assert candidate.model == pytest.approx(damped, rel=1e-9)
    assert solution.num_products == 0


def test_without_a_metric_it_is_gradient_descent() -> None:
    b = torch.arange(1.0, n + 1)
    solution = solve(None, b, 2.0)
    assert torch.equal(solution.step(solution.centre), b / 2)
    assert torch.equal(solve(None, b, 0.0).step(0), b)


@pytest.mark.parametrize(
    ("b", "stop"),
    [(torch.zeros(n), Stop.ZERO_GRADIENT), (torch.full((n,), math.nan), Stop.NON_FINITE)],
)
def test_it_stays_where_there_is_no_step(b: Tensor, stop: Stop) -> None:
    solution = solve(None, b, 1.0)
    assert (solution.stop, solution.iterations) == (stop, 0)
    assert not solution.step(0).any()


def test_a_metric_that_is_none_gives_no_step() -> None:
    solution = solve(-torch.eye(n), torch.ones(n), 1.0)
    assert (solution.stop, float(solution.step(0).norm())) == (Stop.NON_FINITE, 0.0)


def test_the_stop_of_a_run_reaches_it() -> None:
    def stop(i: int, signal: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        solve(None, torch.ones(n), 1.0, on_iteration=stop)


def test_it_trains_without_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    y = x[:, :1].sin()
    optimizer = HessianFree(model.parameters(), solver="metric", preconditioner="none")

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return nn.functional.mse_loss(outputs, y), outputs

    losses = [optimizer.step(forward) for _ in range(15)]
    assert losses[-1] < 0.2 * float(y.var())
    assert losses == sorted(losses, reverse=True)
    assert all(report.num_products == 0 for report in optimizer.history)
    assert optimizer.report is not None
    assert optimizer.report.work < 5.0
