"""Inverses of factors against the exact ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfdist.curvature.kronecker.factors import inverse, inverses


def spd(condition: float, *batch: int, m: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Symmetric matrices [*batch, m, m] of about this condition number."""
    generator = torch.Generator().manual_seed(m)
    Q = torch.linalg.qr(torch.randn(*batch, m, m, dtype=torch.float64, generator=generator))[0]
    values = condition ** -torch.linspace(0, 1, m, dtype=torch.float64)
    M = ((Q * values) @ Q.mT).to(dtype)
    return (M + M.mT) / 2


class Float64(TorchDispatchMode):
    """Whether a matrix of float64 came out of anything inside."""

    any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.any |= any(t.dtype == torch.float64 for t in tree_leaves(out) if t is not None)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverses_of_all_kinds_together(dtype: torch.dtype) -> None:
    """What needs float64, or is no matrix at all, changes nothing of the others."""
    given = [
        spd(10, 2, 3, dtype=dtype),
        torch.tensor([[[2.0]], [[4.0]]], dtype=dtype),
        spd(1e6, 2, m=7, dtype=dtype),
        spd(10, 1, m=9, dtype=dtype),
    ]
    found = inverses(given)
    for M, inverted in zip(given, found):
        exact = torch.linalg.inv(M.double())
        assert inverted.dtype == dtype
        assert torch.allclose(inverted.double(), exact, rtol=1e-3, atol=1e-6 * exact.abs().max())
        assert torch.equal(inverse(M), inverted)


def test_one_that_is_not_positive_but_by_rounding_is_raised() -> None:
    found = inverse(torch.ones(1, 4, 4) * 1e3)[0].double()
    flat = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    assert 1e10 <= flat @ found @ flat / 2 <= 1e13  # by 1e-14 to 1e-10 of the greatest element


def test_one_without_an_inverse_leaves_the_others_alone() -> None:
    good, bad = spd(10, 1), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    found = inverses([bad, good])
    assert torch.equal(found[0], torch.eye(2)[None])  # its diagonal's
    assert torch.equal(found[1], inverse(good))


@pytest.mark.parametrize("relative", [0.2, 0.002])
def test_wide_factors_are_not_inverted_in_float64_without_need(relative: float) -> None:
    """Units that are on together: one great eigenvalue above many small ones."""
    n, generator = 400, torch.Generator().manual_seed(0)
    x = torch.sigmoid(torch.randn(900, n, generator=generator))
    M = x.T @ x / 900
    M += relative * M.diagonal().mean() * torch.eye(n)
    with Float64() as seen:
        raw = inverse(M[None])[0]
    assert not seen.any
    found, exact = raw.double(), torch.linalg.inv(M.double())
    assert float((found - exact).norm() / exact.norm()) < 1e-3
    assert float(torch.linalg.eigvalsh(found)[0]) > 0.0


def test_of_none() -> None:
    assert inverses([]) == []
