"""(S + lambda I)^-1 for many lambda, S symmetric and positive semi-definite."""

from __future__ import annotations

import torch
from torch import Tensor


class Shifted:
    """Solves with a matrix that differs by a multiple of the identity from one that is given.

    Each shift is a Cholesky factorisation, of which one costs a tenth (of some hundred rows) to a thirtieth
    (of some thousand) of an eigendecomposition; the last one's is kept. Where rounding makes the matrix
    indefinite, an eigendecomposition serves all shifts from then on.

    Args:
        S: [n, n]; finite.
    """

    def __init__(self, S: Tensor) -> None:
        self._S = S
        self._factor: tuple[float, Tensor] | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None

    def solve(self, shift: float, b: Tensor) -> Tensor:
        """(S + shift I)^-1 b [n]; of an indefinite S, |S + shift I|^-1 b."""
        if self._eigen is None:
            L = self._factor_of(shift)
            if L is not None:
                x: Tensor = torch.cholesky_solve(b.unsqueeze(1), L).squeeze(1)
                return x
            self._factor = None
            values, vectors = torch.linalg.eigh(self._S)
            self._eigen = values, vectors
        values, vectors = self._eigen
        shifted = (values + shift).abs()
        least = torch.finfo(values.dtype).eps * shifted.max()
        coefficients: Tensor = (vectors.T @ b) / shifted.clamp(min=float(least))
        return vectors @ coefficients

    def _factor_of(self, shift: float) -> Tensor | None:
        if self._factor is not None and self._factor[0] == shift:
            return self._factor[1]
        self._factor = None  # its memory is needed
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
        self._factor = shift, L
        return L
