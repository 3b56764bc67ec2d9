"""Squares of each example's derivatives in a weight, element by element, and summed over the examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfdist.curvature.kronecker.keys import KroneckerKey

Pieces = Sequence[tuple[Tensor, Tensor]]

CHUNK = 2**24
"""Numbers of derivatives that are held at a time."""


def sum_of_squares(key: KroneckerKey, calls: Sequence[Pieces]) -> Tensor:
    """sum_n (sum_t g_nt a_nt')^2 of a layer, [groups, out, in].

    Of an embedding every use counts as an example: those of one token in one example are not added up before.

    Args:
        key: The layer.
        calls: Inputs and g of its uses in one microbatch (see `calls.Uses`), in pieces of other examples.
    """
    if key.is_one_hot:
        total = calls[0][0][1].new_zeros(key.num_inputs, key.num_outputs)
        for ids, g in (piece for pieces in calls for piece in pieces):
            total.index_add_(0, ids.flatten(), g.flatten(0, 1).square())
        return total.T[None]
    total = calls[0][0][1].new_zeros(key.groups, key.num_outputs, key.num_inputs)
    for a, g in _joined(calls):
        n, uses = a.shape[:2]
        a = a.view(n, uses, key.groups, -1).permute(2, 0, 1, 3)  # [groups, n, T, in]
        g = g.reshape(n, uses, key.groups, -1).permute(2, 0, 3, 1)  # [groups, n, out, T]
        if uses == 1:
            total.add_(g[..., 0].square().mT @ a[:, :, 0].square())
            continue
        each = key.groups * a.shape[-1] * g.shape[2]
        step = max(1, CHUNK // max(1, each))
        for low in range(0, n, step):
            part = slice(low, low + step)
            total.add_((g[:, part] @ a[:, part]).square().sum(1))
    return total


def _joined(calls: Sequence[Pieces]) -> list[tuple[Tensor, Tensor]]:
    """Calls on the same examples as one, with the uses of all of them."""
    if len(calls) == 1:
        return list(calls[0])
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for pieces in calls:
        a, g = (torch.cat(parts) for parts in zip(*pieces))
        found.setdefault(len(a), []).append((a, g))
    return [
        (torch.cat([a for a, _ in together], 1), torch.cat([g for _, g in together], 1))
        for together in found.values()
    ]
