"""Geodesic acceleration and its further corrections, against explicit residuals in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import dense
import pytest
import torch
from torch import Tensor

from hfdist.optim.backtracking import Choice, further_descent
from hfdist.optim.least_squares import LeastSquaresOptions
from hfdist.optim.solvers.trials import Model, Trials

LAMBDA = 0.7
THETA = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
POINTS = torch.linspace(-1, 1, 7, dtype=torch.float64)


def curve(theta: Tensor, bend: float) -> Tensor:
    """[7], as far from linear as `bend` says."""
    a, b, c = theta
    return a * POINTS + b * POINTS**2 + bend * torch.sin(a * POINTS + c) * (1.0 + b) - POINTS**3


class Explicit(dense.Residuals):
    """The residuals of `curve` at THETA."""

    def __init__(self, bend: float) -> None:
        super().__init__(torch.func.jacrev(lambda t: curve(t, bend))(THETA), curve(THETA, bend))
        self._bend = bend
        self.passes = 0

    def remainder(self, v: Tensor, Jv: Tensor | None = None) -> Tensor:
        self.passes += 1
        return curve(THETA + v, self._bend) - self.r - self.J @ v


def trials(ls: Explicit, damping: float = LAMBDA, **options: float) -> Trials:
    def solve(lam: float, b: Tensor) -> Tensor:
        return torch.linalg.solve(ls.gram() + lam * torch.eye(3, dtype=b.dtype), b)

    return Trials(
        damping=damping,
        iteration=1,
        solve=lambda lam: solve(lam, -ls.J.T @ ls.r),
        models=lambda v: Model(m=0.0, vDv=float(v @ v)),
        options=LeastSquaresOptions(**options),  # type: ignore[arg-type]
        least_squares=ls,
        bent=lambda lam, w: solve(lam, ls.J.T @ w),
    )


def plain(ls: Explicit, damping: float = LAMBDA) -> Tensor:
    return trials(ls, damping, geodesic_limit=0.0).step(0)


def test_without_corrections_it_is_half_the_second_derivative() -> None:
    """a by the second derivative from autograd."""
    ls = Explicit(0.5)
    v = plain(ls)
    along = torch.func.jacrev(torch.func.jacrev(lambda t: curve(THETA + t * v, 0.5)))
    second = along(torch.zeros((), dtype=torch.float64))
    A = ls.gram() + LAMBDA * torch.eye(3, dtype=torch.float64)
    a = torch.linalg.solve(A, -ls.J.T @ second)
    step = trials(ls, geodesic_corrections=0).step(0)
    # The difference over a tenth of v has an error of third derivatives.
    torch.testing.assert_close(step - v, a / 2, rtol=0.1, atol=0.02 * float(a.norm()))


def test_corrections_end_where_the_path_does() -> None:
    """J'(r(theta + d) - r - Jd) + (J'J + lambda)(d - v) = 0; each comes nearer."""
    ls = Explicit(0.5)
    v = plain(ls)
    A = ls.gram() + LAMBDA * torch.eye(3, dtype=torch.float64)
    left = []
    for number in (0, 1, 3, 50):
        d = trials(ls, geodesic_corrections=number).step(0)
        left.append(float((ls.J.T @ ls.remainder(d) + A @ (d - v)).norm()))
    assert left == sorted(left, reverse=True)
    assert left[1] < 0.5 * left[0]
    assert left[-1] < 1e-13


def test_a_correction_lowers_the_loss_of_a_bent_path() -> None:
    ls = Explicit(0.5)
    losses = [
        float(curve(THETA + step, 0.5).norm())
        for step in (
            plain(ls, 0.05),
            trials(ls, 0.05, geodesic_corrections=0).step(0),
            trials(ls, 0.05).step(0),
        )
    ]
    assert losses == sorted(losses, reverse=True)


class Cubes(Explicit):
    """r(theta + v) = v + 3 v^3 - 1: of little bend at first, and of more further on."""

    def __init__(self) -> None:
        self.r = -torch.ones(3, dtype=torch.float64)
        self.J = torch.eye(3, dtype=torch.float64)

    def remainder(self, v: Tensor, Jv: Tensor | None = None) -> Tensor:
        return 3.0 * v**3


def test_a_correction_that_grows_is_left_out() -> None:
    """v = 1, a = -3/5, of a difference over a tenth of v: v + a/2 = 0.7, and further on 1 - 3 * 0.7^3."""
    for number in (0, 1, 9):
        step = trials(Cubes(), 1e-12, geodesic_limit=2.0, geodesic_corrections=number).step(0)
        torch.testing.assert_close(step, torch.full_like(step, 0.7), rtol=1e-9, atol=0.0)


def test_what_a_step_costs() -> None:
    """One pass for the acceleration, one for each correction; of a step without, one to see that."""
    for options, passes in (
        ({"geodesic_corrections": 0}, 1),
        ({}, 2),
        ({"geodesic_corrections": 3}, 4),
        ({"geodesic_limit": 0.0}, 1),
    ):
        ls = Explicit(0.5)
        trials(ls, **options).step(0)  # type: ignore[arg-type]
        assert ls.passes == passes


def test_falling_lambda_comes_after_the_rising_one() -> None:
    """Plain steps, each in turn; the one before may be taken, so that its solve is not repeated."""
    ls = Explicit(0.5)
    solves: list[float] = []
    t = trials(ls, geodesic_limit=1e9)
    solve = t._solve
    t._solve = lambda lam: solves.append(lam) or solve(lam)  # type: ignore[func-returns-value]
    assert t[0].damping == LAMBDA
    t.step(0)
    for index, damping in zip(t.falling, (LAMBDA / 10, LAMBDA / 100)):
        assert t[index].damping == pytest.approx(damping)
        torch.testing.assert_close(t.step(index), plain(ls, damping), rtol=1e-12, atol=0.0)
    for index in t.falling[1::-1]:
        t.step(index)
    assert solves == pytest.approx([LAMBDA, LAMBDA / 10, LAMBDA / 100])


def test_further_descent_ends_at_the_lowest_loss() -> None:
    asked: list[int] = []

    def loss_of(indices: Sequence[int]) -> list[float]:
        asked.extend(indices)
        return [{5: 3.0, 6: 2.0, 7: math.nan, 8: 1.0}[k] for k in indices]

    assert further_descent(Choice(0, 4.0), range(5, 9), loss_of) == Choice(6, 2.0)
    assert asked == [5, 6, 7]
    assert further_descent(Choice(0, 3.0), range(5, 9), loss_of) == Choice(0, 3.0)
    assert further_descent(Choice(0, 3.0), (), loss_of) == Choice(0, 3.0)
