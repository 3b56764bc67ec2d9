"""AA', computed on and above its diagonal and mirrored: up to half of the multiplications of a product.

torch has no symmetric rank-k update (BLAS's syrk); blocks of it are ordinary products, on any device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 256
"""Rows of a block: smaller ones leave less to compute twice, and are slower products."""


def add_upper(G: Tensor, A: Tensor) -> Tensor:
    """G += AA' in blocks on and above the diagonal; what is below means nothing until `mirror`.

    Args:
        G: [n, n]; changed in place.
        A: [n, m].
    """
    for start, stop in _blocks(len(A)):
        G[start:stop, start:].addmm_(A[start:stop], A[start:].T)
    return G


def mirror(G: Tensor) -> Tensor:
    """Below the diagonal what is above it; in place."""
    for start, stop in _blocks(len(G)):
        G[stop:, start:stop] = G[start:stop, stop:].T
    return G


def product_of_parts(parts: Sequence[Tensor]) -> Tensor:
    """AA' [n, n] of rows that lie apart.

    Args:
        parts: A in pieces [n_k, m]; at least one.
    """
    starts = [0, *itertools.accumulate(len(part) for part in parts)]
    places = [slice(a, b) for a, b in itertools.pairwise(starts)]
    G = parts[0].new_zeros(starts[-1], starts[-1])
    for k, part in enumerate(parts):
        mirror(add_upper(G[places[k], places[k]], part))
        for other, place in zip(parts[k + 1 :], places[k + 1 :]):
            torch.mm(part, other.T, out=G[places[k], place])
            G[place, places[k]] = G[places[k], place].T
    return G


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    """Of nearly equal length."""
    count = max(1, -(-n // BLOCK))
    for k in range(count):
        yield k * n // count, (k + 1) * n // count
