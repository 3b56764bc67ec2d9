"""Inverses of factors against the exact ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfdist.curvature.kronecker.factors import inverse, inverses


def spd(condition: float, *batch: int, m: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Symmetric matrices [*batch, m, m] of about this condition number."""
    generator = torch.Generator().manual_seed(m)
    Q = torch.linalg.qr(torch.randn(*batch, m, m, dtype=torch.float64, generator=generator))[0]
    values = condition ** -torch.linspace(0, 1, m, dtype=torch.float64)
    M = ((Q * values) @ Q.mT).to(dtype)
    return (M + M.mT) / 2


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


def test_of_none() -> None:
    assert inverses([]) == []
