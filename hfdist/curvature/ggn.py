"""Product with the generalized Gauss-Newton matrix of one microbatch, G = J' H_L J ([2] sec. 6).

J is the Jacobian of the model outputs z in the parameters, H_L the Hessian of the loss in z. J' is a
backward pass through the graph of the forward pass, which is kept. For J there are two ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from hfdist.curvature.linearize import Jacobian
from hfdist.curvature.loss_hessian import LossHessian


class GGNProduct:
    """v -> J' H_L J v, J by double backward; everything that does not depend on v is built once.

    Args:
        outputs: z, attached to the parameters' graph.
        loss_hessian: Product with H_L.
        tensors: The parameters.
    """

    def __init__(
        self, outputs: Sequence[Tensor], loss_hessian: LossHessian, tensors: Sequence[Tensor]
    ) -> None:
        self._tensors = list(tensors)
        self._H = loss_hessian
        self._z = [outputs[k] for k in loss_hessian.curved]
        self._w: list[Tensor] = []
        if not self._z:
            return
        # J'w as a function of a dummy w. It is linear in w, so its derivative along v is Jv.
        self._w = [torch.zeros_like(z, requires_grad=True) for z in self._z]
        Jtw = grad(self._z, self._tensors, self._w, create_graph=True, allow_unused=True)
        self._used = [k for k, g in enumerate(Jtw) if g is not None and g.requires_grad]
        self._Jtw = [Jtw[k] for k in self._used]

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        """factor * Gv, shaped like the parameters, for v shaped like them; None stands for zero."""
        if not self._w or not self._used:
            return [None] * len(self._tensors)
        # v -> Jv
        Jv = grad(
            self._Jtw,
            self._w,
            [v[k] for k in self._used],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        # Jv -> H_L Jv
        HJv = _scaled(self._H(Jv), factor)
        # H_L Jv -> J' H_L Jv
        return grad(self._z, self._tensors, HJv, retain_graph=True, allow_unused=True)


class LinearizedGGNProduct:
    """v -> J' H_L J v, J by replaying the forward pass's operations on tangents.

    A layer's Jv costs two matrix products, as with double backward, but its elementary steps are fused
    kernels and nothing but the forward pass's own values is kept.

    Args:
        outputs, loss_hessian, tensors: As for `GGNProduct`.
        jacobian: v -> tangents of the outputs at `loss_hessian.curved`.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        loss_hessian: LossHessian,
        tensors: Sequence[Tensor],
        jacobian: Jacobian,
    ) -> None:
        self._tensors = list(tensors)
        self._H = loss_hessian
        self._J = jacobian
        self._z = [outputs[k] for k in loss_hessian.curved]

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        """factor * Gv, shaped like the parameters, for v shaped like them; None stands for zero."""
        Jv = self._J(v)
        if all(t is None for t in Jv):
            return [None] * len(self._tensors)
        HJv = _scaled(self._H(Jv), factor)
        return grad(self._z, self._tensors, HJv, retain_graph=True, allow_unused=True)


def _scaled(tensors: Sequence[Tensor], factor: float) -> Sequence[Tensor]:
    """Here, among the outputs, a factor costs least."""
    return tensors if factor == 1.0 else [t * factor for t in tensors]
