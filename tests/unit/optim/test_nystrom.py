"""Solves with K + mu I by products with K, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfdist.optim.options import HFOptions
from hfdist.optim.solvers.auto import LARGEST, choice
from hfdist.optim.solvers.nystrom import Nystrom

n = 60


def kernel(decay: float = 0.5, rank: int = n) -> Tensor:
    """[n, n] with eigenvalues 1, decay, decay^2, .., 0 from the rank on."""
    random = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = torch.linalg.qr(random).Q
    values = decay ** torch.arange(n, dtype=torch.float64)
    values[rank:] = 0.0
    return Q @ torch.diag(values) @ Q.T


def vector() -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def nystrom(K: Tensor, **options: object) -> Nystrom:
    return Nystrom(lambda w: K @ w, vector(), HFOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 10, n, 3 * n])
@pytest.mark.parametrize("mu", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("known", [n, 7, 0])
def test_it_solves_to_its_tolerance(rank: int, mu: float, known: int) -> None:
    """Whatever the rank, also where K has fewer directions than that, or none."""
    K, b = kernel(rank=known), vector()
    solver = nystrom(K, sample_rank=rank, sample_tolerance=1e-10)
    x = solver.solve(mu, b)
    assert float((K @ x + mu * x - b).norm()) <= 2e-10 * float(b.norm())
    assert solver.residual <= 1e-10
    exact = torch.linalg.solve(K + mu * torch.eye(n, dtype=K.dtype), b)
    torch.testing.assert_close(x, exact, rtol=1e-8, atol=3e-10 / mu * float(b.norm()))


@pytest.mark.parametrize("mu", [1e-6, 1e-2])
def test_of_full_rank_it_is_an_inverse(mu: float) -> None:
    """CG has nothing left to do."""
    solver = nystrom(kernel(), sample_rank=n)
    solver.solve(mu, vector())
    assert solver.iterations <= 2


def test_a_higher_rank_takes_fewer_iterations() -> None:
    """CG alone needs many."""
    needed = []
    for rank in (1, 10, 20):
        solver = nystrom(kernel(0.7), sample_rank=rank)
        solver.solve(1e-5, vector())
        needed.append(solver.iterations)
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] <= needed[0] / 3


def test_it_ends_after_its_iterations() -> None:
    solver = nystrom(kernel(0.9), sample_rank=1, sample_max_iter=3)
    solver.solve(1e-6, vector())
    assert (solver.iterations, solver.residual > 1e-8) == (3, True)


@pytest.mark.parametrize("mu", [0.0, 0.1])
def test_what_is_zero_gives_zero(mu: float) -> None:
    assert not nystrom(kernel(), sample_rank=5).solve(mu, torch.zeros(n).double()).any()
    assert torch.isfinite(nystrom(kernel(rank=0), sample_rank=5).solve(mu, vector())).all()


def test_products_that_are_not_finite() -> None:
    K = kernel()
    K[3, 3] = float("nan")
    assert not nystrom(K, sample_rank=5).is_finite


@pytest.mark.parametrize(
    ("key", "value"), [("sample_rank", 0), ("sample_tolerance", 0.5), ("sample_max_iter", 0)]
)
def test_options_out_of_their_range(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} is {value}: it must be between"):
        HFOptions(**{key: value})  # type: ignore[arg-type]


def test_auto_takes_a_rank_where_no_matrix_fits() -> None:
    large = LARGEST + 1
    assert choice(large, large) == "krylov"
    assert choice(large, large, sample_rank=100) == "sample_space"
    assert choice(10, large, sample_rank=100) == "sample_space"
    assert choice(large, 10, sample_rank=100) == "dense"
    assert choice(None, large, sample_rank=100) == "krylov"
