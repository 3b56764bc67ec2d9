"""Inverse of a Kronecker product plus a multiple of the identity."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_FLOOR = 1e-6
"""Least eigenvalue that a metric's block has, in units of its mean diagonal element."""


class KroneckerBlock:
    """The matrix A x G of a layer's weight [out, in], by the eigenvectors of its factors.

    Args:
        A: Second moment of the inputs [in, in].
        G: Second moment of the outputs' gradients [out, out], in units of the curvature.
    """

    def __init__(self, A: Tensor, G: Tensor) -> None:
        a, self._QA = eigen(A)
        g, self._QG = eigen(G)
        self._values = g[:, None] * a[None, :]  # [out, in] float64
        self.mean = float(self._values.mean())
        """Mean of the diagonal."""
        self._dtype = A.dtype
        self._QA, self._QG = self._QA.to(A.dtype), self._QG.to(A.dtype)

    def inverse(self, shift: float) -> KroneckerInverse:
        """(A x G + shift I)^-1."""
        inverse = (self._values + shift).reciprocal().to(self._dtype)
        return KroneckerInverse(self._QA, self._QG, inverse)


class KroneckerInverse:
    """V [out, in] -> QG (inverse o (QG' V QA)) QA'."""

    def __init__(self, QA: Tensor, QG: Tensor, inverse: Tensor) -> None:
        self._QA, self._QG, self._inverse = QA, QG, inverse

    def __call__(self, V: Tensor) -> Tensor:
        rotated = (self._QG.T @ V @ self._QA).mul_(self._inverse)
        return self._QG @ rotated @ self._QA.T


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not negative, and eigenvectors of a symmetric matrix, float64."""
    wide = matrix.double()
    wide = (wide + wide.T) / 2
    try:
        values, vectors = torch.linalg.eigh(wide)
    except torch.linalg.LinAlgError:  # rare: a solver that did not converge; another one may
        U, values, _ = torch.linalg.svd(wide)
        values, vectors = values, U
    return values.clamp(min=0.0), vectors
