"""Curvature of what a loss computes from the parameters themselves, beside the model's outputs.

L2 terms, learned temperatures and weights, class centers, a second call of the model inside the loss: the
gradient of such a loss L(z(theta), theta) is J' dL/dz + dL/dtheta. Its curvature here is the Gauss-Newton
matrix of the outputs with theta in L held fixed, plus

    D = sum_k U_k' [L_k'']+ U_k,

over the functions with curvature that a way from the loss back to the parameters meets first (losses, powers,
norms, exponentials, see `loss_hessian.KNOWN_FUNCTIONS`): U_k is the Jacobian of such a function's argument in
the parameters, at fixed outputs, and [L_k'']+ the positive semi-definite part of the loss's Hessian in its
result's argument, by that function alone. So weight/2 |theta|^2 has weight * I, |theta|_1 has none, and D is
positive semi-definite. Products of outputs and parameters are left out; where an argument mixes them and the
arguments are all that the loss depends on, they stand for the outputs instead (see `microbatch.mixed`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfdist.curvature.ggn import GGNProduct
from hfdist.curvature.loss_hessian import Diagonal, LossCall, derivatives_in
from hfdist.curvature.outputs import is_reached, outermost


class SeparateHessians:
    """Block diagonal: a matrix for each argument (a `LossHessian`)."""

    def __init__(self, diagonals: Sequence[Diagonal]) -> None:
        self.curved = list(range(len(diagonals)))
        self._diagonals = diagonals

    @torch.no_grad()
    def __call__(self, v: Sequence[Tensor | None]) -> list[Tensor]:
        # (Double backward gives zeros, not None.)
        return [D(t) for D, t in zip(self._diagonals, v, strict=True) if t is not None]


def direct_product(
    loss: Tensor,
    calls: Sequence[LossCall],
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    is_split: bool,
) -> GGNProduct | None:
    """v -> Dv; None where D is zero.

    Args:
        loss: A scalar with a graph.
        calls: What a `LossWatch` noted while it was computed.
        tensors: The parameters.
        outputs: What stands for the outputs in the loss's graph.
        is_split: Whether they are leaves there; otherwise functions of outputs do not count.
    """
    calls = [call for call in calls if call.is_current()]
    # A power of a norm, or of a loss, has the curvature of both.
    beyond = [call.argument if call.input.numel() == 1 else None for call in calls]
    met = outermost(loss, [call.result for call in calls], beyond)
    calls = [
        calls[k]
        for k in met
        if is_reached(calls[k].input, tensors, without=outputs)
        and (is_split or not is_reached(calls[k].input, outputs))
    ]
    parts = _positive_parts(loss, calls)
    if not parts:
        return None
    arguments, diagonals = zip(*parts)
    return GGNProduct(arguments, SeparateHessians(diagonals), tensors)


def hessian_of_arguments(
    loss: Tensor, calls: Sequence[LossCall], arguments: Sequence[Tensor]
) -> SeparateHessians:
    """sum_k [L_k'']+ over the known functions that the loss meets first, where arguments of theirs stand for
    the outputs and are computed from each other, so that the loss has no partial derivatives in them."""
    calls = [call for call in calls if call.is_current()]
    met = outermost(loss, [call.result for call in calls], [None] * len(calls))
    parts = _positive_parts(loss, [calls[k] for k in met])
    return SeparateHessians([_sum([D for x, D in parts if x is own]) for own in arguments])


def _positive_parts(loss: Tensor, calls: Sequence[LossCall]) -> list[tuple[Tensor, Diagonal]]:
    """(argument, [L_k'']+) of each function that the loss uses."""
    factors = derivatives_in(loss, [call.result for call in calls]) if calls else []
    return [
        (call.input, call.diagonal(f.detach().clamp(min=0.0) if call.is_loss else f.detach()))
        for call, f in zip(calls, factors)
        if f is not None
    ]


def _sum(diagonals: Sequence[Diagonal]) -> Diagonal:
    def D(t: Tensor) -> Tensor:
        total = torch.zeros_like(t)
        for own in diagonals:
            total += own(t)
        return total

    return D
