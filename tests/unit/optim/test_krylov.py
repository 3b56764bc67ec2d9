"""The Krylov space and what is solved in it, against dense float64 matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from hfdist import HessianFree
from hfdist.comm import Communicator
from hfdist.optim.curvature_share import LEAST_SHARE, CurvatureShare
from hfdist.optim.memory import solver_vectors
from hfdist.optim.options import HFOptions
from hfdist.optim.report import Stop
from hfdist.optim.solvers import Solution, System
from hfdist.optim.solvers.krylov import SAME, build, solve
from hfdist.optim.solvers.subproblems import (
    SUBPROBLEMS,
    Projected,
    cubic,
    damping,
    minres,
    trust_region,
)
from hfdist.optim.space import WHOLE, Space
from hfdist.optim.step import HFState

P = 12
RULES = list(SUBPROBLEMS)


def symmetric(seed: int, eigenvalues: Sequence[float] | None = None) -> Tensor:
    """[n, n] float64 with these eigenvalues, by default of all of [0.1, 10]."""
    values = torch.tensor(eigenvalues or torch.logspace(-1, 1, P).tolist(), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q @ torch.diag(values) @ Q.T


def indefinite(seed: int) -> Tensor:
    return symmetric(seed, [-2.0, -0.3, *torch.linspace(0.2, 5.0, P - 2).tolist()])


def vector(seed: int, n: int = P) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(
    B: Tensor, b: Tensor, lambda_: float = 1.0, C: Tensor | None = None, **changes: Any
) -> System:
    def curvature(shift: float) -> Any:
        return lambda v: B @ v + shift * v

    inverse = None if C is None else C.inverse()
    given = {
        "curvature": curvature,
        "exact_curvature": curvature,
        "b": b,
        "damping": lambda_,
        "preconditioner": lambda _: None if inverse is None else inverse.mv,
    }
    return System(**{**given, **changes})


def options(**changes: Any) -> HFOptions:
    return HFOptions(**{"solver": "krylov", "krylov_length": "full", **changes})


def columns(of: Callable[[np.ndarray], Tensor], k: int) -> Tensor:
    """[n, k]: what a linear function of coordinates does to each."""
    return torch.stack([of(e) for e in np.eye(k)], 1)


# -- the space ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 5, P])
@pytest.mark.parametrize("matrix", [symmetric, indefinite])
def test_the_space_is_orthonormal_in_the_metric_and_holds_the_projected_matrix(
    dim: int, matrix: Callable[[int], Tensor]
) -> None:
    B, C, b = matrix(0), symmetric(1), vector(2)
    space = build(system(B, b, C=C), options(krylov_min_dim=1, krylov_max_dim=dim))
    assert (space.dim, space.num_products) == (dim, dim)
    projected, _ = space.projected()
    U, V = columns(space.U.combine, dim), columns(space.V.combine, dim)
    torch.testing.assert_close(U.T @ C @ U, torch.eye(dim).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(V, C @ U, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.from_numpy(projected.T), U.T @ B @ U, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.from_numpy(projected.b), U.T @ b, rtol=1e-9, atol=1e-10)
    # It is the Krylov space of C^-1 B and C^-1 b.
    power, powers = torch.linalg.solve(C, b), []
    for _ in range(dim):
        powers.append(power / power.norm())
        power = torch.linalg.solve(C, B @ powers[-1])
    inside = U @ torch.linalg.lstsq(U, powers[-1][:, None]).solution[:, 0]
    torch.testing.assert_close(inside, powers[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("C", [None, symmetric(1)])
def test_the_last_step_joins_at_the_price_of_a_product(C: Tensor | None) -> None:
    B, b, last = symmetric(0), vector(2), vector(3)
    space = build(system(B, b, C=C, start=last), options(krylov_max_dim=4))
    assert (space.dim, space.num_products) == (4, 5)
    projected, basis = space.projected()
    W = columns(lambda y: space.step(y, basis), 5)
    torch.testing.assert_close(torch.from_numpy(projected.T), W.T @ B @ W, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.from_numpy(projected.b), W.T @ b, rtol=1e-9, atol=1e-10)
    inside = W @ torch.linalg.lstsq(W, last[:, None]).solution[:, 0]
    torch.testing.assert_close(inside, last, rtol=1e-9, atol=1e-10)
    metric = torch.eye(P).double() if C is None else C
    rest = W.T @ metric @ W
    torch.testing.assert_close(rest[4, :4], torch.zeros(4).double(), rtol=0, atol=1e-10)


def test_a_last_step_inside_the_space_adds_nothing() -> None:
    B, b = symmetric(0), vector(2)
    space = build(system(B, b, start=B @ b + 3.0 * b), options(krylov_max_dim=4))
    assert space.projected()[0].T.shape == (4, 4)


@pytest.mark.parametrize("C", [None, symmetric(1)])
@pytest.mark.parametrize("start", [None, vector(3)])
@pytest.mark.parametrize(("lambda_", "tolerance"), [(0.0, 1e-8), (1e-9, SAME)])
def test_the_whole_space_with_little_damping_holds_the_newton_step(
    C: Tensor | None, start: Tensor | None, lambda_: float, tolerance: float
) -> None:
    B, b = symmetric(0), vector(2)
    solution = solve(system(B, b, lambda_, C, start=start), options(krylov_max_dim=P))
    x, newton = solution.step(len(solution.candidates) - 1), torch.linalg.solve(B, b)
    assert float((x - newton).norm() / newton.norm()) < tolerance
    assert solution.stop is Stop.RESIDUAL
    assert solution.residual < 1e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lambda_", [0.0, 0.1])
def test_one_parameter(lambda_: float, rule: str) -> None:
    B, b = torch.tensor([[4.0]]).double(), torch.tensor([2.0]).double()
    for start in (None, torch.tensor([0.7]).double()):
        given = system(B, b, lambda_, start=start)
        solution = solve(given, options(krylov_subproblem=rule))
        assert (solution.iterations, solution.stop) == (1, Stop.RESIDUAL)
        shortest = min(
            float((solution.step(i) - 0.5).abs()) for i in range(len(solution.candidates))
        )
        assert shortest < 5e-3


def test_an_exhausted_space_ends_the_iteration() -> None:
    B = symmetric(0, [1.0] * 4 + [2.0] * 4 + [5.0] * 4)  # three different eigenvalues
    solution = solve(system(B, vector(2), 0.0), options())
    assert (solution.iterations, solution.stop) == (3, Stop.RESIDUAL)
    newton = torch.linalg.solve(B, vector(2))
    torch.testing.assert_close(solution.step(0), newton, rtol=1e-8, atol=1e-8)


def test_no_curvature_at_all_still_gives_steps_along_the_gradient() -> None:
    b = vector(2)
    solution = solve(system(torch.zeros(P, P).double(), b), options())
    assert (solution.iterations, solution.stop) == (1, Stop.RESIDUAL)
    x = solution.step(solution.centre)
    assert torch.isfinite(x).all()
    torch.testing.assert_close(x / x.norm(), b / b.norm())


def test_progress_ends_the_space_where_products_buy_little() -> None:
    B = symmetric(0, [1.0 + 1e-3 * k for k in range(P)])
    short = solve(system(B, vector(2), 1e-6), options(krylov_length="progress"))
    assert short.stop is Stop.PROGRESS
    assert options().krylov_min_dim <= short.iterations < 6
    full = solve(system(B, vector(2), 1e-6), options(krylov_max_dim=8))
    assert (full.stop, full.iterations) == (Stop.MAX_ITERATIONS, 8)
    assert len(full.quadratic) == 9
    assert np.diff(full.quadratic).max() <= 1e-12


def test_no_damping_is_one_candidate() -> None:
    B, b = symmetric(0), vector(2)
    for rule in RULES:
        solution = solve(system(B, b, 0.0), options(krylov_subproblem=rule))
        assert [candidate.damping for candidate in solution.candidates] == [0.0]
        torch.testing.assert_close(solution.step(0), torch.linalg.solve(B, b), rtol=1e-6, atol=1e-8)


# -- its candidates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("matrix", [symmetric, indefinite])
@pytest.mark.parametrize("lambda_", [1e-6, 0.1, 30.0])
def test_candidates_are_those_of_falling_lambda_and_say_what_they_are(
    rule: str, matrix: Callable[[int], Tensor], lambda_: float
) -> None:
    B, b = matrix(0), vector(2)
    given = system(B, b, lambda_, symmetric(1), start=vector(3))
    solution = solve(given, options(krylov_subproblem=rule, krylov_max_dim=6))
    dampings = [candidate.damping for candidate in solution.candidates]
    assert dampings == sorted(dampings, reverse=True)
    assert 0 <= solution.centre < len(dampings)
    if rule in ("damping", "minres"):
        assert dampings[0] == pytest.approx(lambda_ * 4.0**16)
        assert lambda_ == pytest.approx(dampings[solution.centre]) or lambda_ < dampings[-1]
    for index, candidate in enumerate(solution.candidates):
        x = solution.step(index)
        expected = float(x @ B @ x / 2 - b @ x)
        assert candidate.undamped_model == pytest.approx(expected, rel=1e-8, abs=1e-11)
        assert candidate.model >= candidate.undamped_model
        assert float(b @ x) >= 0.0, "a direction of descent"


def test_the_space_does_not_depend_on_lambda() -> None:
    B, b = symmetric(0), vector(2)
    low, high = (solve(system(B, b, lambda_), options(krylov_max_dim=6)) for lambda_ in (0.25, 4.0))
    found = {c.damping: low.step(k) for k, c in enumerate(low.candidates)}
    same = [k for k, c in enumerate(high.candidates) if c.damping in found]
    assert len(same) > 10
    for k in same:
        torch.testing.assert_close(
            high.step(k), found[high.candidates[k].damping], rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_lambda_counts_in_units_of_the_curvature(factor: float) -> None:
    B, b, C = symmetric(0), vector(2), symmetric(1)
    given = solve(system(B, b, 0.1, C), options())
    scaled = solve(system(factor * B, factor * b, 0.1, factor * C), options())
    assert len(given.candidates) == len(scaled.candidates)
    for k in range(len(given.candidates)):
        assert scaled.candidates[k].damping == pytest.approx(given.candidates[k].damping, rel=1e-9)
        torch.testing.assert_close(scaled.step(k), given.step(k), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kept", ["bfloat16", "host"])
def test_how_the_basis_is_kept(kept: Any) -> None:
    B, b, C = symmetric(0), vector(2), symmetric(1)
    full = solve(system(B, b, 0.01, C), options(krylov_max_dim=8))
    other = solve(system(B, b, 0.01, C), options(krylov_max_dim=8, krylov_basis=kept))
    if kept == "bfloat16":
        assert other.num_bytes == full.num_bytes / 4
    else:
        assert other.num_bytes == full.num_bytes  # the host is where these vectors are

    def least(solution: Solution) -> float:
        steps = [solution.step(k) for k in range(len(solution.candidates))]
        return min(float(x @ B @ x / 2 - b @ x) for x in steps)

    if kept == "host":
        assert least(other) == pytest.approx(least(full), rel=1e-9)
    else:
        assert least(other) < 0.95 * least(full)


# -- without a basis ---------------------------------------------------------------------------------


def assert_candidates_of_the_basis(given: System, **changes: Any) -> Solution:
    """Those of five lambda, whichever the basis offers, too."""
    full = solve(given, options(**changes))
    short = solve(given, options(krylov_basis="none", **changes))
    assert (short.iterations, short.num_products) == (full.iterations, full.num_products)
    assert short.stop is full.stop
    assert short.quadratic == pytest.approx(full.quadratic, rel=1e-9)
    places = {round(math.log2(c.damping), 6): k for k, c in enumerate(full.candidates)}
    for k, candidate in enumerate(short.candidates):
        place = places[round(math.log2(candidate.damping), 6)]
        of_basis = full.candidates[place]
        assert candidate.model == pytest.approx(of_basis.model, rel=1e-8)
        assert candidate.undamped_model == pytest.approx(of_basis.undamped_model, rel=1e-8)
        x = full.step(place)
        torch.testing.assert_close(
            short.step(k), x, rtol=0, atol=1e-8 * float(x.abs().max()), msg=f"candidate {k}"
        )
    middle = math.log2(full.candidates[full.centre].damping)
    near = [place for place in places if abs(place - middle) <= 4.0 + 1e-6]
    assert len(short.candidates) == len(near)
    assert short.candidates[short.centre].damping == pytest.approx(2.0**middle)
    return short


@pytest.mark.parametrize("dim", [1, 2, 3, 6])
@pytest.mark.parametrize("lambda_", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("C", [None, symmetric(1)])
@pytest.mark.parametrize("start", [None, vector(3)])
def test_without_a_basis_candidates_are_the_same(
    dim: int, lambda_: float, C: Tensor | None, start: Tensor | None
) -> None:
    """In longer spaces rounding takes the vectors' orthogonality, as in CG."""
    given = system(symmetric(0), vector(2), lambda_, C, start=start)
    assert_candidates_of_the_basis(given, krylov_min_dim=1, krylov_max_dim=dim)


def test_without_a_basis_memory_does_not_grow_with_the_space() -> None:
    """3 vectors of U, 3 of C U, 3 of each of five lambda, and what U has of the last step; those of a
    System are not counted."""
    given = system(symmetric(0), vector(2), start=vector(3))
    for dim in (5, 11):
        found = solve(given, options(krylov_max_dim=dim, krylov_basis="none"))
        assert found.num_bytes == (3 + 3 + 3 * 5 + 1) * 8 * P
        assert found.num_bytes + 8 * 8 * P == 8 * P * solver_vectors(
            options(krylov_max_dim=dim, krylov_basis="none"), P
        )
    alone = options(krylov_basis="none", krylov_momentum=False)
    assert solve(given, alone).num_bytes == (3 + 3 + 2 * 5) * 8 * P
    assert solver_vectors(alone, P) == 8 + 16


def test_without_a_basis_an_exhausted_space_ends_the_solve() -> None:
    b = torch.zeros(P, dtype=torch.float64)
    b[:2] = 1.0
    given = system(torch.diag(torch.linspace(1, 3, P).double()), b, 0.1, start=vector(3))
    found = assert_candidates_of_the_basis(given)
    assert found.stop is Stop.RESIDUAL


def test_without_a_basis_lambdas_below_negative_curvature_are_left_out() -> None:
    B, b = indefinite(0), vector(2)
    found = solve(system(B, b, 1.0), options(krylov_max_dim=6, krylov_basis="none"))
    space = build(system(B, b, 1.0), options(krylov_max_dim=6))
    least = -float(space.projected()[0].theta[0]) / space.unit
    assert 0 < len(found.candidates) < 5
    assert all(candidate.damping > least for candidate in found.candidates)
    for k in range(len(found.candidates)):
        assert float(b @ found.step(k)) > 0.0  # downhill


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"damping"}))
def test_without_a_basis_other_subproblems_are_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match=f"krylov_basis is none: .* not {rule}"):
        options(krylov_basis="none", krylov_subproblem=rule)


def test_training_without_a_basis() -> None:
    model = nn.Linear(5, 3)
    x, y = torch.randn(20, 5), torch.randn(20, 3)
    optimizer = HessianFree(model.parameters(), krylov_basis="none")
    for _ in range(3):
        optimizer.step(lambda: (nn.functional.mse_loss(out := model(x), y), out))
    best = torch.linalg.lstsq(torch.cat((x, torch.ones(20, 1)), 1), y).solution
    least = nn.functional.mse_loss(torch.cat((x, torch.ones(20, 1)), 1) @ best, y)
    with torch.no_grad():
        assert float(nn.functional.mse_loss(model(x), y)) == pytest.approx(float(least), rel=1e-3)


# -- over ranks --------------------------------------------------------------------------------------


def steps_on_rank(comm: Communicator, is_sharded: bool, kept: str = "full") -> list[Tensor]:
    """Candidates' steps, whole, of vectors that lie whole on every rank or in parts."""
    rank, world_size = comm.rank, comm.world_size
    B, C, b, last = symmetric(0), symmetric(1), vector(2), vector(3)
    mine = torch.arange(P).tensor_split(world_size)[rank] if is_sharded else torch.arange(P)

    def whole(part: Tensor) -> Tensor:
        v = torch.zeros(P, dtype=torch.float64)
        v[mine] = part
        return comm.all_reduce(v) if is_sharded else v

    def of_parts(A: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: (A @ whole(v))[mine]

    inverse = of_parts(C.inverse())
    space = Space(total_of=comm.all_reduce, whole_numel=P) if is_sharded else WHOLE
    given = System(
        curvature=lambda shift: of_parts(B + shift * torch.eye(P)),
        exact_curvature=lambda shift: of_parts(B + shift * torch.eye(P)),
        b=b[mine],
        damping=0.1,
        preconditioner=lambda _: inverse,
        start=last[mine],
        space=space,
    )
    solution = solve(given, options(krylov_max_dim=5, krylov_basis=kept))
    return [whole(solution.step(k)) for k in range(len(solution.candidates))]


@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("kept", ["full", "none"])
def test_ranks_have_the_serial_steps(is_sharded: bool, kept: Any) -> None:
    serial = solve(
        system(symmetric(0), vector(2), 0.1, symmetric(1), start=vector(3)),
        options(krylov_max_dim=5, krylov_basis=kept),
    )
    expected = [serial.step(k) for k in range(len(serial.candidates))]
    found = on_ranks(2, steps_on_rank, is_sharded, kept, timeout=240.0)
    for steps in found:
        assert len(steps) == len(expected)
        for x, y in zip(steps, expected):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    for x, y in zip(*found):
        assert torch.equal(x, y)


# -- the small problems ------------------------------------------------------------------------------


def projected(matrix: Callable[[int], Tensor], seed: int = 0) -> Projected:
    return Projected(T=matrix(seed).numpy(), b=vector(seed + 10).numpy())


def absolute(T: np.ndarray) -> np.ndarray:
    """|T| = T sign(T), the sign by Newton and Schulz."""
    X = T / np.linalg.norm(T, 2)
    for _ in range(60):
        X = 1.5 * X - 0.5 * X @ X @ X
    return T @ X


@pytest.mark.parametrize("matrix", [symmetric, indefinite])
@pytest.mark.parametrize("factor", [0.25, 1.0, 64.0])
def test_damping_solves_the_shifted_system(matrix: Callable[[int], Tensor], factor: float) -> None:
    p = projected(matrix)
    small = damping(p, 0.3, factor)
    assert small.shift == 0.3 * factor
    expected = np.linalg.solve(absolute(p.T) + small.shift * np.eye(P), p.b)
    np.testing.assert_allclose(small.y, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("matrix", [symmetric, indefinite])
@pytest.mark.parametrize("factor", [1e-2, 1.0, 64.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trust_region_is_the_least_of_the_model_in_a_ball(
    matrix: Callable[[int], Tensor], factor: float, seed: int
) -> None:
    p = projected(matrix, seed)
    radius = float(np.linalg.norm(damping(p, 0.3, 1.0).y)) / math.sqrt(factor)
    small = trust_region(p, 0.3, factor)
    assert_is_least_in_ball(p, small.y, small.shift, radius)


def assert_is_least_in_ball(p: Projected, y: np.ndarray, mu: float, radius: float) -> None:
    """Moré and Sorensen's conditions, which are necessary and sufficient."""
    A = p.T + mu * np.eye(len(y))
    np.testing.assert_allclose(A @ y, p.b, rtol=1e-6, atol=1e-7)
    assert mu >= 0.0
    assert np.linalg.eigvalsh(A)[0] >= -1e-9
    assert np.linalg.norm(y) <= radius * (1 + 1e-9)
    assert mu < 1e-9 or np.linalg.norm(y) == pytest.approx(radius, rel=1e-6)


def hard_case() -> Projected:
    """b has nothing along the lowest curvature."""
    T = indefinite(0).numpy()
    lowest = np.linalg.eigh(T)[1][:, 0]
    b = vector(10).numpy()
    return Projected(T=T, b=b - lowest * (lowest @ b))


def test_trust_region_in_the_hard_case_reaches_the_boundary() -> None:
    p = hard_case()
    radius = float(np.linalg.norm(damping(p, 0.3, 1.0).y)) / math.sqrt(1e-2)
    small = trust_region(p, 0.3, 1e-2)
    assert_is_least_in_ball(p, small.y, small.shift, radius)
    assert small.shift == pytest.approx(2.0, rel=1e-6)
    assert np.linalg.norm(small.y) == pytest.approx(radius, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-2, 1.0, 64.0])
@pytest.mark.parametrize("p", [projected(symmetric), projected(indefinite), hard_case()])
def test_cubic_is_the_least_of_the_regularised_model(p: Projected, factor: float) -> None:
    sigma = factor * 0.3 / float(np.linalg.norm(damping(p, 0.3, 1.0).y))
    small = cubic(p, 0.3, factor)
    # Nesterov and Polyak's conditions.
    A = p.T + small.shift * np.eye(P)
    np.testing.assert_allclose(A @ small.y, p.b, rtol=1e-6, atol=1e-7)
    assert small.shift == pytest.approx(sigma * np.linalg.norm(small.y), rel=1e-6)
    assert np.linalg.eigvalsh(A)[0] >= -1e-9


def test_minres_has_the_least_residual_of_the_space() -> None:
    B, C, b = symmetric(0), symmetric(1), vector(2)
    space = build(system(B, b, C=C), options(krylov_max_dim=5))
    p, basis = space.projected()
    x = space.step(minres(p, 1e-9, 1.0).y, basis)
    root = torch.linalg.cholesky(C)  # |r| in the metric's inverse is |root^-1 r|
    U = columns(space.U.combine, 5)
    y = torch.linalg.lstsq(
        torch.linalg.solve(root, B @ U), torch.linalg.solve(root, b[:, None])
    ).solution[:, 0]
    torch.testing.assert_close(x, U @ y, rtol=1e-7, atol=1e-9)


def test_minres_turns_ascent_along_negative_curvature_into_descent() -> None:
    p = projected(indefinite)
    y = minres(p, 1e-9, 1.0).y
    np.testing.assert_allclose(absolute(p.T) @ y, p.b, rtol=1e-6, atol=1e-7)


# -- what one step hands to the next -----------------------------------------------------------------


def test_the_state_goes_through_plain_numbers_unchanged() -> None:
    x0 = vector(0)
    share = CurvatureShare(share=0.25, log_ratio=-0.1, rho=1 / 3)
    state = HFState(
        damping=1 / 7,
        x0=x0,
        step=12,
        explore=False,
        curvature_seen=2 / 3,
        curvature_share=share,
    )
    scalars = json.loads(json.dumps(state.scalars()))
    assert HFState.restored(scalars, x0) == state
    assert HFState.restored(HFState(damping=1.0).scalars(), None) == HFState(damping=1.0)


def test_the_state_of_an_earlier_version_is_read() -> None:
    state = HFState.restored({"damping": 0.5, "step": 3, "gone": 1}, None)
    assert (state.damping, state.step, state.explore) == (0.5, 3, False)
    assert state.curvature_share == CurvatureShare()


def test_the_first_share_is_of_enough_examples() -> None:
    shares = [CurvatureShare().at(n) for n in (0, 100, 512, 10**6)]
    assert shares == [1.0, 1.0, 0.5, LEAST_SHARE]
    assert CurvatureShare(share=0.3).at(100) == 0.3


def test_the_share_doubles_where_the_model_breaks_its_promise() -> None:
    first = CurvatureShare()
    calm = first.after(1.0, 1.0, True, 0.25)
    assert calm.at(10**6) == 0.25
    assert first.after(1.0, 1.0, False, 0.25).share == 0.5, "a rejected step"
    steps = {"curvature": (100.0, 1.0), "promise": (1.0, 0.0)}
    for name, (ratio, rho) in steps.items():
        state, count = first, 0
        while state.share in (None, 0.25):
            state, count = state.after(ratio, rho, True, 0.25), count + 1
        assert (state.share, 1 <= count < 4) == (0.5, True), name
        assert (state.log_ratio, state.rho) == (0.0, 1.0), "another share is judged anew"
    assert first.after(1.0, -5.0, False, 0.75).share == 1.0
    assert first.after(1.0, -5.0, False, 1.0).share == 1.0


def test_unknown_ratios_say_nothing_of_the_share() -> None:
    state = CurvatureShare(share=0.25, log_ratio=0.3, rho=0.9)
    assert state.after(math.nan, math.nan, True, 0.25) == state


# -- in steps ----------------------------------------------------------------------------------------


def saddle_loss(curvature_opt: str, **rules: Any) -> float:
    """After five steps from beside a saddle: z = (10 x, u v / 10) for the targets (0, 1), near u = v = 0."""
    theta = torch.tensor([0.5, 0.1, 0.12], dtype=torch.float64, requires_grad=True)

    def forward() -> tuple[Tensor, Tensor]:
        x, u, v = theta
        z = torch.stack((10.0 * x, 0.1 * u * v))
        return 0.5 * (z - torch.tensor([0.0, 1.0]).double()).square().sum(), z

    optimizer = HessianFree([theta], curvature_opt=curvature_opt, **rules)
    return [optimizer.step(forward) for _ in range(5)][-1]


def test_the_hessians_negative_curvature_leads_off_a_saddle() -> None:
    stalled = saddle_loss("ggn", solver="cg", preconditioner="none")
    assert stalled > 0.45
    for rule in RULES:
        found = saddle_loss("hessian", preconditioner="none", krylov_subproblem=rule)
        assert found < 0.3, rule


@pytest.mark.parametrize("preconditioner", ["none", "kfac"])
@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
def test_a_factor_on_the_loss_changes_no_step(preconditioner: str, curvature_opt: str) -> None:
    ends = []
    for factor in (1.0, 1000.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        pairs = [(torch.randn(20, 5).double(), torch.randint(3, (20,)))]

        def loss_func(outputs: Tensor, targets: Tensor, factor: float = factor) -> Tensor:
            return factor * nn.functional.cross_entropy(outputs, targets)

        optimizer = HessianFree(
            model.parameters(),
            curvature_opt,
            preconditioner=preconditioner,
            krylov_max_dim=6,
            seed=1,
        )
        losses = [optimizer.acc_step(model, loss_func, pairs) / factor for _ in range(4)]
        ends.append((losses, torch.cat([p.detach().reshape(-1) for p in model.parameters()])))
    (losses, end), (other_losses, other_end) = ends
    assert losses[-1] < losses[0]
    assert other_losses == pytest.approx(losses, rel=1e-7)
    torch.testing.assert_close(other_end, end, rtol=1e-5, atol=1e-7)
