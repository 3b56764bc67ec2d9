"""Vectors of a Krylov space, all of them or the last few."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hfdist.optim.solvers.subproblems import Vector
from hfdist.optim.space import Space

ROWS = 4
"""Vectors that a basis takes memory for at a time."""
TERMS = 2
"""A product is orthogonal by itself to all vectors but so many, in exact arithmetic (Lanczos)."""
WINDOW = TERMS + 1
"""Vectors that are kept where there is no basis: the next one joins before the last are done with."""


class Basis:
    """Vectors [n], one a row, and what is done with all of them at once.

    Memory is taken for a few vectors at a time: how many there will be is not known, and a device gives at
    once what it is asked for, used or not.

    Args:
        like: One of them [n].
        kept: "full", "bfloat16" or "host".
        space: How vectors lie over ranks.
    """

    def __init__(self, like: Tensor, kept: str, space: Space) -> None:
        self._like, self._space = like, space
        self._is_matrix = kept == "full"
        self._dtype = torch.bfloat16 if kept == "bfloat16" else like.dtype
        self._device = torch.device("cpu") if kept == "host" else like.device
        self._blocks: list[Tensor] = []  # [ROWS, n] each
        self.size = 0

    @property
    def num_bytes(self) -> int:
        """On the vectors' device."""
        on_device = (b.nbytes for b in self._blocks if b.device == self._like.device)
        return sum(on_device)

    def append(self, v: Tensor, divisor: Tensor) -> Tensor:
        """Keep v / divisor; returns it as it is kept."""
        if self.size == ROWS * len(self._blocks):
            shape = (ROWS, self._like.numel())
            self._blocks.append(torch.empty(shape, dtype=self._dtype, device=self._device))
        row = self._blocks[-1][self.size % ROWS]
        if self._is_matrix:
            torch.div(v, divisor.to(v.dtype), out=row)
        else:
            row.copy_(v / divisor.to(v.dtype))
        self.size += 1
        return self.vector(self.size - 1)

    def _used(self) -> Iterator[tuple[int, Tensor]]:
        """(number of its first vector, vectors) of each block."""
        for k, block in enumerate(self._blocks):
            if k * ROWS < self.size:
                yield k * ROWS, block[: self.size - k * ROWS]

    def dots(self, v: Tensor, *scalars: Tensor) -> Tensor:
        """Each vector's product with v, float64 [size], followed by more scalars: one reduction."""
        if self._is_matrix:
            local = torch.cat([rows @ v for _, rows in self._used()]).double()
        else:
            local = torch.stack([torch.dot(self.vector(i), v).double() for i in range(self.size)])
        return self._space.total(torch.cat((local, *(s.double().reshape(1) for s in scalars))))

    def dot(self, i: int, v: Tensor) -> Tensor:
        """This rank's part of vector i's product with v."""
        return torch.dot(self.vector(i % self.size), v)

    def subtract(self, v: Tensor, factors: Tensor) -> None:
        """v -= sum_i factors_i row_i, in place."""
        factors = factors.to(v.dtype)
        if self._is_matrix:
            for first, rows in self._used():
                own = factors[first : first + len(rows)]
                torch.addmv(v, rows.T, own, alpha=-1.0, out=v)
        else:
            for i in range(self.size):
                v.addcmul_(self.vector(i), factors[i], value=-1.0)

    def combine(self, y: Vector) -> Tensor:
        """sum_i y_i row_i [n]."""
        out = torch.zeros_like(self._like)
        self.subtract(out, torch.from_numpy(-y).to(out.device, non_blocking=True))
        return out

    def vector(self, i: int) -> Tensor:
        """Vector i [n]."""
        return self._blocks[i // ROWS][i % ROWS].to(self._like)


class Window(Basis):
    """The last three vectors of a basis; products with the others count as zero."""

    def __init__(self, like: Tensor, space: Space) -> None:
        super().__init__(like, "full", space)
        self._rows: list[Tensor] = []
        self._is_matrix = False

    @property
    def num_bytes(self) -> int:
        return sum(row.nbytes for row in self._rows)

    def append(self, v: Tensor, divisor: Tensor) -> Tensor:
        if len(self._rows) < WINDOW:
            self._rows.append(torch.empty_like(v))
        self.size += 1
        return torch.div(v, divisor.to(v.dtype), out=self.vector(self.size - 1))

    def dots(self, v: Tensor, *scalars: Tensor) -> Tensor:
        first = max(0, self.size - TERMS)
        near = [torch.dot(self.vector(i), v).double() for i in range(first, self.size)]
        local = torch.stack([*near, *(s.double().reshape(()) for s in scalars)])
        return torch.cat((local.new_zeros(first), self._space.total(local)))

    def subtract(self, v: Tensor, factors: Tensor) -> None:
        factors = factors.to(v.dtype)
        for i in range(max(0, self.size - TERMS), self.size):
            v.addcmul_(self.vector(i), factors[i], value=-1.0)

    def vector(self, i: int) -> Tensor:
        return self._rows[i % WINDOW]
