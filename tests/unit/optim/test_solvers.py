"""What every solver of the table promises, against dense float64 matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import dense
import pytest
import torch
from torch import Tensor

from hfdist.optim.options import HFOptions
from hfdist.optim.report import Stop
from hfdist.optim.solvers import SOLVERS, Solution, SolverOptions, System
from hfdist.optim.solvers.krylov import SAME

n = 12
EXACT: dict[str, Any] = {
    "cg_stop": "residual",
    "cg_tol": 1e-13,
    "cg_max_iter": 100,
    "krylov_length": "full",
}

# "metric" uses no products: see test_metric_solver.py; "auto" is one of the others.
OF_A_RANK = "sample_space of a rank"
pytestmark = pytest.mark.parametrize(
    "name", [*(name for name in SOLVERS if name not in ("metric", "auto")), OF_A_RANK]
)


def spd(seed: int, shift: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return root @ root.T / n + shift * torch.eye(n, dtype=torch.float64)


def vector(seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(B: Tensor, b: Tensor, damping: float, **changes: Any) -> System:
    def curvature(shift: float) -> Any:
        return lambda v: B @ v + shift * v

    return System(
        **{
            "curvature": curvature,
            "exact_curvature": curvature,
            "b": b,
            "damping": damping,
            **changes,
        }
    )


def residuals(B: Tensor, b: Tensor) -> dense.Residuals:
    """r(x) = r + Jx, with a given J'J and J'r."""
    is_finite = bool(torch.isfinite(B).all())
    J = torch.linalg.cholesky(B).T if is_finite else B
    return dense.Residuals(J, -torch.linalg.solve(J.T, b) if is_finite else b)


def solve(name: str, given: System, **options: Any) -> Solution:
    if name == OF_A_RANK:
        name, options = "sample_space", {"sample_rank": 5, "sample_tolerance": 1e-12, **options}
    if name == "sample_space":
        A = given.curvature(0.0)
        B = torch.stack([A(e).clone() for e in torch.eye(n, dtype=torch.float64)])
        if bool(torch.isfinite(B).all()) and float(torch.linalg.eigvalsh(B).min()) <= 0.0:
            pytest.skip("residuals have a positive semi-definite matrix")
        given = replace(given, least_squares=residuals(B, given.b))
    return SOLVERS[name](given, HFOptions(solver=name, **{**EXACT, **options}))


def model(B: Tensor, b: Tensor, x: Tensor) -> float:
    return float(x @ B @ x / 2 - b @ x)


def test_the_option_names_exactly_the_table(name: str) -> None:
    assert set(get_args(get_type_hints(SolverOptions)["solver"])) == set(SOLVERS)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("damping", [1e-8, 0.1, 10.0])
def test_every_candidate_has_the_model_value_that_it_says(
    name: str, damping: float, preconditioned: bool
) -> None:
    B, b = spd(0), vector(1)
    metric = spd(5).inverse()
    given = system(
        B, b, damping, **({"preconditioner": lambda _: metric.mv} if preconditioned else {})
    )
    solution = solve(name, given)
    assert len(solution.candidates) > 0
    assert len({c.damping for c in solution.candidates}) in (1, len(solution.candidates))
    for index, candidate in enumerate(solution.candidates):
        x = solution.step(index)
        undamped = model(B, b, x)
        if candidate.undamped_model is not None:
            assert candidate.undamped_model == pytest.approx(undamped, rel=1e-9, abs=1e-12)
        else:
            damped = undamped + 0.5 * candidate.damping * float(x @ x)
            assert candidate.model == pytest.approx(damped, rel=1e-9, abs=1e-12)
        assert undamped <= 1e-12, "no candidate is worse than standing still"
    if not name.startswith("sample_space"):  # of rows, which the residuals count
        assert solution.num_products >= solution.iterations
    assert solution.num_bytes > 0


def test_with_little_damping_it_finds_the_newton_step(name: str) -> None:
    B, b = spd(2), vector(3)
    solution = solve(name, system(B, b, 1e-9))
    best = min(
        range(len(solution.candidates)),
        key=lambda index: model(B, b, solution.step(index)),
    )
    # Candidates of a Krylov space end where they hardly differ.
    tolerance = SAME if name in ("krylov", "auto") else 1e-6
    newton = torch.linalg.solve(B, b)
    assert float((solution.step(best) - newton).norm() / newton.norm()) <= tolerance


def test_more_damping_gives_shorter_steps(name: str) -> None:
    B, b = spd(2), vector(3)
    lengths = []
    for damping in (0.1, 1.0, 10.0, 100.0):
        solution = solve(name, system(B, b, damping))
        last = len(solution.candidates) - 1
        index = last if solution.is_path else 0 if solution.takes_first else solution.centre
        lengths.append(float(solution.step(index).norm()))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0] / 10


def test_a_zero_gradient_is_a_stationary_point(name: str) -> None:
    solution = solve(name, system(spd(0), torch.zeros(n, dtype=torch.float64), 1.0))
    assert solution.stop is Stop.ZERO_GRADIENT
    assert (solution.iterations, float(solution.step(0).norm())) == (0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_product_leaves_finite_steps(name: str, bad: float) -> None:
    calls = []

    def curvature(shift: float) -> Any:
        def A(v: Tensor) -> Tensor:
            calls.append(1)
            return spd(0) @ v if len(calls) < 3 else torch.full_like(v, bad)

        return A

    solution = solve(name, system(spd(0), vector(1), 1e-6, curvature=curvature))
    assert solution.stop is Stop.NON_FINITE
    for index in range(len(solution.candidates)):
        assert torch.isfinite(solution.step(index)).all()


def test_negative_curvature_still_gives_a_descent(name: str) -> None:
    B = spd(4)
    values, basis = torch.linalg.eigh(B)
    B = basis @ torch.diag(torch.cat((torch.tensor([-1.0, -0.2]).double(), values[2:]))) @ basis.T
    b = vector(6)
    solution = solve(name, system(B, b, 0.05))
    assert min(model(B, b, solution.step(i)) for i in range(len(solution.candidates))) < 0.0


def test_every_iteration_is_told(name: str) -> None:
    told: list[int] = []
    solution = solve(name, system(spd(0), vector(1), 0.1, on_iteration=lambda i, _: told.append(i)))
    assert told == list(range(1, solution.iterations + 1))


def test_what_the_callback_raises_propagates(name: str) -> None:
    def on_iteration(i: int, signal: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        solve(name, system(spd(0), vector(1), 0.1, on_iteration=on_iteration))
