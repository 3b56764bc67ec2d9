"""Product with the Hessian of one microbatch's loss (Pearlmutter 1994)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hfdist.curvature.reverse import grad


class HessianProduct:
    """v -> Hv as the derivative of the gradient along v; the gradient's graph is built once.

    Args:
        gradient: dL/dtheta with a graph, one tensor a parameter; None where the loss does not use it.
        tensors: The parameters.
    """

    overlaps = True

    def __init__(self, gradient: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        # A parameter in which the loss is linear has a gradient without a graph, and no curvature.
        self._curved = [k for k, g in enumerate(gradient) if g is not None and g.requires_grad]
        self._gradient: list[Tensor] = [gradient[k] for k in self._curved]  # type: ignore[misc]

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        """factor * Hv, shaped like the parameters, for v shaped like them; None stands for zero."""
        if not self._gradient:
            return [None] * len(self._tensors)
        return grad(
            self._gradient,
            self._tensors,
            [v[k] if factor == 1.0 else v[k] * factor for k in self._curved],
            retain_graph=True,
            allow_unused=True,
        )
