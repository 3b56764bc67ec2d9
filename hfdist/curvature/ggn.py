"""Product with the generalized Gauss-Newton matrix of one microbatch, G = J' H_L J ([2] sec. 6).

J is the Jacobian of the model outputs z in the parameters, H_L the Hessian of the loss in z. J' is a
backward pass through the graph of the forward pass, which is kept. For J there are two ways: the
forward pass's operations replayed on tangents (`hfdist.curvature.linearize`), and double backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfdist.curvature.layout import Product
from hfdist.curvature.linearize import Jacobian
from hfdist.curvature.loss_hessian import LossHessian
from hfdist.curvature.reverse import grad


class GGNProduct:
    """v -> J' H_L J v.

    Args:
        outputs: z, attached to the parameters' graph.
        loss_hessian: Product with H_L.
        tensors: The parameters.
        jacobian: v -> tangents of the outputs at `loss_hessian.curved`; None: by double backward.
    """

    overlaps = True

    def __init__(
        self,
        outputs: Sequence[Tensor],
        loss_hessian: LossHessian,
        tensors: Sequence[Tensor],
        jacobian: Jacobian | None = None,
    ) -> None:
        self._tensors = list(tensors)
        self._z = [outputs[k] for k in loss_hessian.curved]
        self.H = loss_hessian
        self.J = DoubleBackwardJacobian(self._z, tensors) if jacobian is None else jacobian

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        """factor * Gv, shaped like the parameters, for v shaped like them; None stands for zero."""
        # v -> Jv
        Jv = self.J(v)
        if all(t is None for t in Jv):
            return [None] * len(self._tensors)
        # Jv -> H_L Jv
        HJv = _scaled(self.H(Jv), factor)
        # H_L Jv -> J' H_L Jv
        return self.pulled_back(HJv)

    def pulled_back(self, u: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """J'u, shaped like the parameters, for u shaped like the outputs; None stands for zero."""
        return grad(self._z, self._tensors, u, retain_graph=True, allow_unused=True)


class DoubleBackwardJacobian:
    """v -> Jv: J'w is linear in w, so its derivative in w along v is Jv. Its graph is built once.

    Args:
        outputs: z, attached to the parameters' graph.
        tensors: The parameters.
    """

    def __init__(self, outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        self._num_outputs = len(outputs)
        self._used: list[int] = []
        if not outputs:
            return
        # Any w does, but at zero some backward passes (logcumsumexp's) have no derivative.
        self._w = [torch.ones_like(z, requires_grad=True) for z in outputs]
        Jtw = grad(outputs, list(tensors), self._w, create_graph=True, allow_unused=True)
        self._used = [k for k, g in enumerate(Jtw) if g is not None and g.requires_grad]
        self._Jtw = [Jtw[k] for k in self._used]

    def __call__(self, v: Sequence[Tensor]) -> list[Tensor | None]:
        """Jv, a tensor an output; None for zero."""
        if not self._used:
            return [None] * self._num_outputs
        return list(
            grad(
                self._Jtw,
                self._w,
                [v[k] for k in self._used],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )


class SumOfProducts:
    """v -> sum of the products of several matrices."""

    overlaps = False

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = list(products)

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        """factor * sum, shaped like the parameters, for v shaped like them; None stands for zero."""
        total: list[Tensor | None] = [None] * len(v)
        for product in self._products:
            total = added(total, product(v, factor))
        return total


def added(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums tensor by tensor; None stands for zero."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _scaled(tensors: Sequence[Tensor], factor: float) -> Sequence[Tensor]:
    """Here, among the outputs, a factor costs least."""
    return tensors if factor == 1.0 else [t * factor for t in tensors]
