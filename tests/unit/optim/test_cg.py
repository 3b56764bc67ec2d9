"""CG against dense solves, and each of its ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hfdist.optim.options import HFOptions
from hfdist.optim.report import Stop
from hfdist.optim.solvers.cg import backtracking_grid, cg, made_too_little_progress
from hfdist.optim.space import WHOLE, Space

P = 20


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix [P, P] with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return Q @ torch.diag(eigenvalues.double()) @ Q.T


def vector(seed: int = 1, n: int = P) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def options(**changes: object) -> HFOptions:
    return HFOptions(**{"cg_stop": "residual", "cg_tol": 1e-12, "cg_max_iter": 500, **changes})


def phi(A: Tensor, b: Tensor, x: Tensor) -> float:
    return float(0.5 * x @ A @ x - b @ x)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("start", ["zero", "warm"])
def test_solves_as_the_dense_solver_does(preconditioned: bool, start: str) -> None:
    A, b = symmetric(torch.logspace(-2, 2, P)), vector()
    M = (lambda v: v / A.diagonal()) if preconditioned else None
    x0 = vector(seed=5) if start == "warm" else None
    result = cg(lambda v: A @ v, b, x0, M, options())
    assert result.stop is Stop.RESIDUAL
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)
    assert result.residual == pytest.approx(float((b - A @ result.x).norm() / b.norm()), abs=1e-11)


@pytest.mark.parametrize("start", ["zero", "warm"])
def test_quadratic_is_that_of_the_iterates(start: str) -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    x0 = vector(seed=5) if start == "warm" else None
    result = cg(lambda v: A @ v, b, x0, None, options(cg_max_iter=12))
    assert len(result.quadratic) == result.iterations + 1
    for i, x in result.iterates:
        assert result.quadratic[i] == pytest.approx(phi(A, b, x), rel=1e-10, abs=1e-12)
    assert result.quadratic == sorted(result.quadratic, reverse=True)


def test_iterates_lie_on_martens_grid_and_end_with_the_last() -> None:
    A, b = symmetric(torch.logspace(-3, 2, 80), seed=2), vector(n=80)
    result = cg(lambda v: A @ v, b, None, None, options(cg_max_iter=25))
    grid = sorted({math.ceil(1.3**j) - 1 for j in range(40)})
    assert [i for i, _ in result.iterates] == [i for i in grid if i <= 25] + [25] * (25 not in grid)
    assert result.iterates[-1][1] is result.x


def test_grid_is_exact_far_out() -> None:
    on_grid = backtracking_grid(1.3)
    grid = {math.ceil(1.3**j) - 1 for j in range(40)}
    assert [i for i in range(5000) if on_grid(i)] == sorted(i for i in grid if i < 5000)


def test_a_diagonal_matrix_and_its_inverse_take_one_iteration() -> None:
    d = torch.linspace(1, 50, P, dtype=torch.float64)
    result = cg(lambda v: d * v, vector(), None, lambda v: v / d, options())
    assert result.iterations == 1


def test_products_start_at_zero_without_one_and_warm_with_one() -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    calls = 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return A @ v

    cold = cg(product, b, None, None, options(cg_max_iter=5))
    assert (calls, cold.num_products) == (5, 5)
    warm = cg(product, b, vector(seed=3), None, options(cg_max_iter=5))
    assert (calls - 5, warm.num_products) == (6, 6)


def test_zero_right_hand_side_ends_at_zero() -> None:
    A = symmetric(torch.ones(P))
    result = cg(lambda v: A @ v, torch.zeros(P).double(), vector(), None, options())
    assert result.stop is Stop.ZERO_GRADIENT
    assert result.num_products == 0
    assert not result.x.any()


def test_exact_start_ends_there() -> None:
    A, x = symmetric(torch.logspace(-1, 1, P)), vector()
    result = cg(lambda v: A @ v, A @ x, x, None, options(cg_tol=1e-8))
    assert (result.stop, result.iterations) == (Stop.EXACT_START, 0)
    assert torch.equal(result.x, x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 3])
def test_non_finite_product_keeps_the_last_good_iterate(bad: float, at: int) -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    calls = 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return A @ v if calls < at else torch.full_like(v, bad)

    result = cg(product, b, None, None, options())
    assert result.stop is Stop.NON_FINITE
    assert result.iterations == at - 1
    reference = cg(lambda v: A @ v, b, None, None, options(cg_max_iter=max(at - 1, 1)))
    expected = torch.zeros_like(b) if at == 1 else reference.x
    torch.testing.assert_close(result.x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["stop", "use", "absolute"])
def test_nonpositive_curvature(rule: str) -> None:
    eigenvalues = torch.logspace(-1, 1, P)
    eigenvalues[7] = -3.0
    A, b = symmetric(eigenvalues), vector()
    result = cg(lambda v: A @ v, b, None, None, options(nonpositive_curvature=rule, cg_max_iter=60))
    if rule == "absolute":
        assert result.stop is not Stop.NONPOSITIVE_CURVATURE
        assert result.x.isfinite().all()
        return
    assert result.stop is Stop.NONPOSITIVE_CURVATURE
    # Up to there it is plain CG on directions of positive curvature; "use" adds one more move down.
    assert result.quadratic[-1] == pytest.approx(phi(A, b, result.x), rel=1e-9)
    assert result.quadratic == sorted(result.quadratic, reverse=True)
    before = cg(lambda v: A @ v, b, None, None, options(nonpositive_curvature="stop"))
    assert result.iterations - before.iterations == (rule == "use")


def test_negative_definite_matrix_stops_at_the_start() -> None:
    A, b = -symmetric(torch.ones(P)), vector()
    result = cg(lambda v: A @ v, b, None, None, options())
    assert (result.stop, result.iterations) == (Stop.NONPOSITIVE_CURVATURE, 0)
    assert not result.x.any()


def test_martens_rule_has_the_factor_k() -> None:
    # 11 values: i = 10 = k is not yet past the window.
    rules = HFOptions(cg_stop="martens")
    assert not made_too_little_progress([0.0] * 11, rules)
    # i = 11, k = 10: progress over the window is 4e-3 of phi: under 10 * 5e-4, over 5e-4.
    values = [0.0, *torch.linspace(-0.996, -1.0, 11).tolist()]
    assert made_too_little_progress(values, rules)
    assert not made_too_little_progress(values, HFOptions(cg_stop="relative_progress"))
    # A positive phi (a bad warm start) never stops the rule of the paper.
    assert not made_too_little_progress([1.0] * 12, rules)


def test_iteration_cap_defaults_to_the_dimension() -> None:
    A, b = symmetric(torch.logspace(-6, 6, P)), vector()
    result = cg(lambda v: A @ v, b, None, None, options(cg_max_iter=None))
    assert (result.stop, result.iterations) == (Stop.MAX_ITERATIONS, P)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("start", ["zero", "warm"])
def test_packed_products_of_shards_give_the_same_iterates(preconditioned: bool, start: str) -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    M = (lambda v: v / A.diagonal()) if preconditioned else None
    x0 = vector(seed=5) if start == "warm" else None
    rules = options(cg_max_iter=8)  # later, rounding drives any two orders of summation apart
    whole = cg(lambda v: A @ v, b, x0, M, rules)
    reductions = []
    space = Space(total_of=lambda scalars: reductions.append(scalars.numel()) or scalars)
    shards = cg(lambda v: A @ v, b, x0, M, rules, space=space)
    assert shards.iterations == whole.iterations
    torch.testing.assert_close(shards.x, whole.x, rtol=1e-10, atol=1e-10)
    at_start = 1 if x0 is None else 2
    assert len(reductions) - at_start == shards.iterations  # one packed reduction an iteration


@pytest.mark.parametrize("end", ["residual", "non_finite", "nonpositive"])
def test_lagged_reads_change_nothing_but_the_last_product(end: str) -> None:
    eigenvalues = torch.logspace(-1, 1, P)
    if end == "nonpositive":
        eigenvalues[3] = -1.0
    A, b = symmetric(eigenvalues), vector()
    results = []
    for lagged in (False, True):
        calls = 0

        def product(v: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return A @ v * (math.nan if end == "non_finite" and calls == 4 else 1.0)

        results.append(cg(product, b, None, None, options(), lagged=lagged))
    plain, late = results
    assert torch.equal(plain.x, late.x)
    assert (plain.stop, plain.quadratic) == (late.stop, late.quadratic)
    assert late.num_products == plain.num_products + 1


def test_the_host_reads_once_an_iteration() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    A, b = symmetric(torch.logspace(-3, 3, P)), vector()
    counts = []
    for max_iter in (4, 14):
        with Reads() as reads:
            cg(lambda v: A @ v, b, None, lambda v: v * 2, options(cg_max_iter=max_iter))
        counts.append(reads.count)
    # tolist reads a tensor's memory without an operator on a CPU; what would read more does not.
    assert counts[1] - counts[0] <= 10


def test_b_and_x0_are_left_alone() -> None:
    A, b, x0 = symmetric(torch.logspace(-1, 1, P)), vector(), vector(seed=9)
    b_before, x0_before = b.clone(), x0.clone()
    cg(lambda v: A @ v, b, x0, None, options())
    assert torch.equal(b, b_before)
    assert torch.equal(x0, x0_before)


def test_an_operator_may_reuse_its_result() -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    out = torch.empty_like(b)
    result = cg(lambda v: torch.mv(A, v, out=out), b, vector(seed=4), None, options())
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)


def rounded(A: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> Av as a sum over ranks in bfloat16 would give it."""
    return lambda v: (A @ v).to(torch.bfloat16).to(v)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shards"])
def test_residuals_are_replaced_by_true_ones(preconditioned: bool, shared: bool) -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    M = (lambda v: v / A.diagonal()) if preconditioned else None
    space = Space(total_of=lambda sums: sums) if shared else WHOLE
    rules = {"cg_max_iter": 40, "cg_tol": 0.0}
    found = {}
    for every in (None, 5):
        result = cg(
            rounded(A),
            b,
            None,
            M,
            options(cg_residual_replacement=every, **rules),
            exact=lambda v: A @ v,
            space=space,
        )
        assert result.iterations == 40
        assert result.num_products == 40 + (0 if every is None else 8)
        found[every] = float((b - A @ result.x).norm() / b.norm())
        if every:  # the last iteration is one of those that are replaced
            assert result.residual == pytest.approx(found[every], rel=1e-6)
            assert result.quadratic[-1] == pytest.approx(phi(A, b, result.x), rel=1e-9)
    assert found[5] < 0.2 * found[None]


def test_replacement_changes_nothing_where_nothing_is_rounded() -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    plain = cg(lambda v: A @ v, b, None, None, options(cg_max_iter=12))
    replaced = cg(
        lambda v: A @ v, b, None, None, options(cg_max_iter=12, cg_residual_replacement=3)
    )
    torch.testing.assert_close(replaced.x, plain.x, rtol=1e-9, atol=1e-11)


def test_a_product_that_overflows_in_a_replacement_ends_the_solve() -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    result = cg(
        lambda v: A @ v,
        b,
        None,
        None,
        options(cg_residual_replacement=4),
        exact=lambda v: v * math.inf,
    )
    assert result.stop is Stop.NON_FINITE
    assert bool(result.x.isfinite().all())


@pytest.mark.parametrize("kept", ["bfloat16", "host"])
def test_iterates_are_kept_in_less_memory(kept: str) -> None:
    A, b = symmetric(torch.logspace(-1, 1, P)), vector()
    whole = cg(lambda v: A @ v, b, None, None, options(cg_max_iter=12))
    less = cg(lambda v: A @ v, b, None, None, options(cg_max_iter=12, cg_iterates=kept))
    assert [i for i, _ in less.iterates] == [i for i, _ in whole.iterates]
    assert less.iterates[-1][1] is less.x
    for place, (_, x) in enumerate(whole.iterates):
        back = less.iterate(place)
        assert (back.dtype, back.device) == (x.dtype, x.device)
        # bfloat16 has 8 bits: it rounds by 2^-9 at most.
        torch.testing.assert_close(back, x, rtol=2**-8 if kept == "bfloat16" else 0.0, atol=0.0)
    if kept == "bfloat16":
        assert less.num_bytes < whole.num_bytes
