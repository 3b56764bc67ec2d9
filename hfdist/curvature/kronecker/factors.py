"""A factor of a Kronecker product: a symmetric matrix, full or in diagonal blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SIZE = 2048
"""Rows of the largest block: a larger factor is cut into equal ones, whose inverses cost less."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """[groups, n, n], its part outside the blocks taken for zero."""

    blocks: Tensor
    """[groups, number, size, size]; the last block may reach beyond n: zeros there."""
    n: int

    @classmethod
    def of_rows(cls, x: Tensor, groups: int = 1, max_size: int = MAX_SIZE) -> Factor:
        """sum_r x_r x_r' of every group, for x [R, groups * n]."""
        n = x.shape[1] // groups
        number, size = block_shape(n, max_size)
        if groups == number == 1:
            return cls(blocks=(x.T @ x)[None, None], n=n)
        x = x.view(-1, groups, n)
        if number * size > n:
            x = torch.nn.functional.pad(x, (0, number * size - n))
        x = x.reshape(-1, groups * number, size).transpose(0, 1)  # [groups * number, R, size]
        return cls(blocks=(x.mT @ x).view(groups, number, size, size), n=n)

    @classmethod
    def of_diagonal(cls, diagonal: Tensor) -> Factor:
        """A diagonal matrix [n]."""
        return cls(blocks=diagonal.view(1, -1, 1, 1), n=len(diagonal))

    @property
    def groups(self) -> int:
        return self.blocks.shape[0]

    @property
    def is_diagonal(self) -> bool:
        return self.blocks.shape[-1] == 1

    def diagonal(self) -> Tensor:
        """[groups, n]."""
        return self.blocks.diagonal(dim1=2, dim2=3).flatten(1)[:, : self.n]

    def means(self) -> Tensor:
        """Mean of each group's diagonal [groups], float64."""
        return self.diagonal().double().mean(1)

    def times(self, factors: Tensor) -> Factor:
        """Each group times a number, [groups]."""
        return Factor(blocks=self.blocks * factors.to(self.blocks)[:, None, None, None], n=self.n)

    def plus(self, other: Factor) -> Factor:
        """The sum; of factors that are cut differently it is cut like one, and has the other's diagonal."""
        if other.blocks.shape == self.blocks.shape:
            return Factor(blocks=self.blocks + other.blocks, n=self.n)
        a, b = (other, self) if self.is_diagonal else (self, other)
        groups, number, size, _ = a.blocks.shape
        padded = torch.nn.functional.pad(b.diagonal(), (0, number * size - b.n))
        return Factor(blocks=a.blocks + torch.diag_embed(padded.view(groups, number, size)), n=a.n)

    def without_last(self) -> Factor:
        """Less its last row and column."""
        _, number, size, _ = self.blocks.shape
        if number == 1:
            return Factor(blocks=self.blocks[:, :, :-1, :-1], n=self.n - 1)
        blocks = self.blocks.clone()
        last = (self.n - 1) % size
        blocks[:, -1, last, :] = 0.0
        blocks[:, -1, :, last] = 0.0
        if last == 0:
            blocks = blocks[:, :-1]
        return Factor(blocks=blocks, n=self.n - 1)


def block_shape(n: int, max_size: int = MAX_SIZE) -> tuple[int, int]:
    """(number, size) of the blocks that n rows are cut into."""
    number = -(-n // max_size)
    return number, -(-n // number)


def shifted(factor: Factor, shift: Tensor) -> Tensor:
    """The blocks of factor + diag(shift), shift [groups, n]; 1 beyond n."""
    groups, number, size, _ = factor.blocks.shape
    full = torch.nn.functional.pad(
        shift.to(factor.blocks), (0, number * size - factor.n), value=1.0
    )
    blocks = factor.blocks.clone()
    blocks.diagonal(dim1=2, dim2=3).add_(full.view(groups, number, size))
    return blocks


EXACT = 1e-2
"""The most that M M^-1 p may be off of a vector p, relative to it."""


def inverse(matrix: Tensor) -> Tensor:
    """Inverse of symmetric, positive definite matrices [.., m, m]; see `inverses`."""
    return inverses([matrix])[0]


def inverses(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of symmetric, positive definite matrices, each [.., m, m], by Cholesky factors.

    In float64 where their own precision is not enough. A matrix that is not positive definite but by
    rounding is raised a little; it must be finite. The host looks once at all of them, and once more for each
    further try of those that need one.
    """
    found: dict[int, Tensor] = {
        k: matrix.reciprocal() for k, matrix in enumerate(matrices) if matrix.shape[-1] == 1
    }
    rest = [k for k in range(len(matrices)) if k not in found]
    for raised in (None, 0.0, 1e-14, 1e-10, 1e-6):
        if not rest:
            break
        tries = [_inverse(matrices[k], raised) for k in rest]
        is_good = torch.stack([good for _, good in tries]).tolist()
        found.update((k, M) for k, (M, _), good in zip(rest, tries, is_good) if good)
        rest = [k for k, good in zip(rest, is_good) if not good]
    for k in rest:
        diagonal = matrices[k].diagonal(dim1=-2, dim2=-1)
        found[k] = torch.diag_embed(diagonal.reciprocal())
    return [found[k] for k in range(len(matrices))]


def _inverse(matrix: Tensor, raised: float | None) -> tuple[Tensor, Tensor]:
    """The inverse, in the matrix's own precision or, raised by so much of its greatest diagonal element, in
    float64; and whether it is good, a bool on the device."""
    size = matrix.diagonal(dim1=-2, dim2=-1).amax(-1)  # [..]
    wide = matrix if raised is None else matrix.double()
    if raised:
        wide = wide + torch.diag_embed((raised * size.double())[..., None].expand(wide.shape[:-1]))
    L, info = torch.linalg.cholesky_ex(wide)
    is_positive = info == 0  # [..]
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    L = torch.where(is_positive[..., None, None], L, identity)
    if L.device.type == "cpu":
        found = torch.cholesky_inverse(L)
    else:  # of which the host would read an error code
        found = torch.cholesky_solve(identity.expand_as(L), L)
    good = is_positive.all()
    if raised is None:
        # Looked at, since bounds by the diagonals alone are far off for wide matrices.
        p = torch.arange(len(identity), dtype=L.dtype, device=L.device).cos()
        rest = (matrix @ (found @ p)[..., None])[..., 0] - p
        good = good & (rest.norm(dim=-1) <= EXACT * p.norm()).all()
    return found.to(matrix.dtype), good


def multiply_left(blocks: Tensor, V: Tensor) -> Tensor:
    """Block-diagonal [groups, number, m, m] times V [groups, n, k]."""
    groups, number, size, _ = blocks.shape
    n, k = V.shape[1:]
    if size == 1:
        return V * blocks.view(groups, number, 1)
    if number == 1:
        return blocks[:, 0] @ V
    padded = torch.nn.functional.pad(V, (0, 0, 0, number * size - n))
    return (blocks @ padded.view(groups, number, size, k)).view(groups, -1, k)[:, :n]


def multiply_right(V: Tensor, blocks: Tensor) -> Tensor:
    """V [groups, k, n] times block-diagonal [groups, number, m, m]."""
    return multiply_left(blocks.mT, V.mT).mT


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of them; of symmetric matrices [.., m, m] one triangle."""
    return torch.cat([_triangle(t) for t in tensors])


def unpacked(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `packed` was given."""
    found, start = [], 0
    for t in like:
        stop = start + packed_numel(t)
        found.append(_matrix(vector[start:stop], t))
        start = stop
    return found


def packed_numel(t: Tensor) -> int:
    if not _is_symmetric(t):
        return t.numel()
    m = t.shape[-1]
    return t.numel() // (m * m) * (m * (m + 1) // 2)


def _is_symmetric(t: Tensor) -> bool:
    return t.ndim >= 3 and t.shape[-1] == t.shape[-2] > 1


def _triangle(t: Tensor) -> Tensor:
    if not _is_symmetric(t):
        return t.reshape(-1)
    rows, columns = torch.tril_indices(t.shape[-1], t.shape[-1], device=t.device)
    return t[..., rows, columns].reshape(-1)


def _matrix(part: Tensor, like: Tensor) -> Tensor:
    if not _is_symmetric(like):
        return part.view(like.shape)
    m = like.shape[-1]
    rows, columns = torch.tril_indices(m, m, device=part.device)
    out = part.new_empty(like.shape)
    lower = part.view(*like.shape[:-2], -1)
    out[..., rows, columns] = lower
    out[..., columns, rows] = lower
    return out
