"""Solves with S + lambda I for many lambda, against torch's solver."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch

from hfdist.optim.solvers.shifted import Shifted
from hfdist.optim.solvers.trials import FACTORS


def matrix(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S [20, 20] of a rank, and a vector."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(20, rank, generator=generator, dtype=torch.float64)
    return A @ A.T, torch.randn(20, generator=generator, dtype=torch.float64)


def test_all_trials_of_a_step_are_factorisations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven of them cost less than the eigendecomposition of some hundred rows."""

    def never(S: torch.Tensor) -> NoReturn:
        raise AssertionError("an eigendecomposition")

    monkeypatch.setattr(torch.linalg, "eigh", never)
    S, b = matrix(20)
    shifted = Shifted(S)
    for shift in (1e-3 * factor for factor in FACTORS):
        for w in (b, b.flip(0)):
            truth = torch.linalg.solve(S + shift * torch.eye(20, dtype=S.dtype), w)
            torch.testing.assert_close(shifted.solve(shift, w), truth)


@pytest.mark.parametrize("shifts", [(1e-20, 1.0), (1.0, 1e-20, 0.5)])
def test_what_rounding_leaves_without_a_factor(shifts: tuple[float, ...]) -> None:
    """Rank 5 of 20: in directions that S has nothing of, a shift below rounding is no number."""
    S, b = matrix(5)
    inside = S @ b
    shifted = Shifted(S)
    for shift in shifts:
        x = shifted.solve(shift, inside)
        torch.testing.assert_close(S @ x + shift * x, inside, rtol=1e-8, atol=1e-8)
