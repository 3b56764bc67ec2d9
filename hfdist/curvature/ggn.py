"""Product with the generalized Gauss-Newton matrix of one microbatch, G = J' H_L J ([2] sec. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad


class GGNProduct:
    """v -> J' H_L J v by double backward; everything that does not depend on v is built once.

    J is the Jacobian of the model outputs z in the parameters, H_L the Hessian of the loss in z.

    Args:
        outputs: z, attached to the parameters' graph.
        loss_inputs: The tensors that the loss was computed from: z itself, or detached copies of it.
        loss_gradient: dL/dz with a graph to `loss_inputs`; None where the loss does not use z_i.
        tensors: The parameters.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        loss_inputs: Sequence[Tensor],
        loss_gradient: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
    ) -> None:
        # An output that the loss does not use, or uses linearly, has no curvature.
        curved = [k for k, dz in enumerate(loss_gradient) if dz is not None and dz.requires_grad]
        self._tensors = list(tensors)
        self._z = [outputs[k] for k in curved]
        self._z_in = [loss_inputs[k] for k in curved]
        self._dz: list[Tensor] = [loss_gradient[k] for k in curved]  # type: ignore[misc]
        self._w: list[Tensor] = []
        if not self._z:
            return
        # J'w as a function of a dummy w. It is linear in w, so its derivative along v is Jv.
        self._w = [torch.zeros_like(z, requires_grad=True) for z in self._z]
        Jtw = grad(self._z, self._tensors, self._w, create_graph=True, allow_unused=True)
        self._used = [k for k, g in enumerate(Jtw) if g is not None and g.requires_grad]
        self._Jtw: list[Tensor] = [Jtw[k] for k in self._used]

    def __call__(self, v: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Gv, shaped like the parameters, for v shaped like the parameters; None stands for zero."""
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
        HJv = grad(
            self._dz,
            self._z_in,
            Jv,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        # H_L Jv -> J' H_L Jv
        return grad(self._z, self._tensors, HJv, retain_graph=True, allow_unused=True)
