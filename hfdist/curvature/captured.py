"""A product as one graph of kernels: captured once, run again with another v.

The host launches a small model's kernels more slowly than a device runs them; a graph is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfdist.curvature.layout import Product
from hfdist.devices import NotCaptured, captured, to_be_captured


class CapturedProduct:
    """v -> Bv, by kernels launched one by one at first, and from the second time on by their graph.

    What it returns is overwritten by the next call.

    Args:
        product: Of tensors that stay where they are, from a forward pass inside `devices.to_be_captured`.
        device: Where they are.
        warn: Told once why there is no graph, if there is none; products are then as without.
    """

    overlaps = False  # hooks of a backward pass run in the capture alone

    def __init__(self, product: Product, device: torch.device, warn: Callable[[str], None]) -> None:
        self._product, self._device, self._warn = product, device, warn
        self._is_warm, self._has_failed = False, False
        self._factor: float | None = None
        self._v: list[Tensor] = []
        self._run: Callable[[], None] | None = None
        self._results: Sequence[Tensor | None] = []

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        """factor * Bv, shaped like the parameters, for v shaped like them; None stands for zero."""
        if self._is_warm and not self._has_failed and factor != self._factor:
            self._capture(v, factor)
        if self._run is None or factor != self._factor:
            self._is_warm = True  # kernels are loaded, and workspaces taken, outside of a capture
            with to_be_captured(self._device):
                return self._product(v, factor)
        for own, given in zip(self._v, v):
            own.copy_(given)
        self._run()
        return self._results

    def _capture(self, v: Sequence[Tensor], factor: float) -> None:
        self._v = [t.detach().clone() for t in v]
        try:
            self._run, self._results = captured(
                self._device, lambda: self._product(self._v, factor)
            )
            self._factor = factor
        except NotCaptured as reason:
            self._has_failed, self._v = True, []
            self._warn(f"products are not captured as graphs: {reason}")
