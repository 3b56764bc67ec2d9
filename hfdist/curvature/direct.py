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
    factors = derivatives_in(loss, [call.result for call in calls]) if calls else []
    arguments: list[Tensor] = []
    diagonals: list[Diagonal] = []
    for call, factor in zip(calls, factors):
        if factor is not None:
            factor = factor.detach()
            arguments.append(call.input)
            diagonals.append(call.diagonal(factor.clamp(min=0.0) if call.is_loss else factor))
    if not arguments:
        return None
    return GGNProduct(arguments, SeparateHessians(diagonals), tensors)
