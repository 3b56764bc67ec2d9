"""(S + lambda I)^-1 for many lambda, S symmetric and positive semi-definite."""

from __future__ import annotations

import torch
from torch import Tensor


class Shifted:
    """Solves with a matrix that differs by a multiple of the identity from one that is given.

    The first solves are Cholesky factorisations, of which one costs about a tenth of an eigendecomposition;
    from `_CHOLESKY` on, or where rounding makes the matrix indefinite, one eigendecomposition serves all.

    Args:
        S: [n, n]; finite.
    """

    _CHOLESKY = 4

    def __init__(self, S: Tensor) -> None:
        self._S = S
        self._factors: dict[float, Tensor] = {}
        self._eigen: tuple[Tensor, Tensor] | None = None

    def solve(self, shift: float, b: Tensor) -> Tensor:
        """(S + shift I)^-1 b [n]; of an indefinite S, |S + shift I|^-1 b."""
        if self._eigen is None:
            L = self._factors.get(shift)
            if L is None and len(self._factors) < self._CHOLESKY:
                L = self._factor(shift)
            if L is not None:
                x: Tensor = torch.cholesky_solve(b.unsqueeze(1), L).squeeze(1)
                return x
            values, vectors = torch.linalg.eigh(self._S)
            self._eigen = values, vectors
        values, vectors = self._eigen
        shifted = (values + shift).abs()
        least = torch.finfo(values.dtype).eps * shifted.max()
        coefficients: Tensor = (vectors.T @ b) / shifted.clamp(min=float(least))
        return vectors @ coefficients

    def _factor(self, shift: float) -> Tensor | None:
        A = self._S.clone()
        A.diagonal().add_(shift)
        L, failed = torch.linalg.cholesky_ex(A)
        # A pivot at the level of rounding: the factor exists, and says nothing.
        diagonal = L.diagonal()
        tiny = (
            float(diagonal.min()) ** 2 < 8 * torch.finfo(L.dtype).eps * float(diagonal.max()) ** 2
        )
        if int(failed) or tiny:
            return None
        self._factors[shift] = L
        return L
