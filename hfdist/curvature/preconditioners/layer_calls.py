"""Which layers a forward pass goes through: the calls whose weights are trained, their inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hfdist.curvature.outputs import Edge, edge


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """y = x W' + b."""

    weight: int
    """Index of W [out, in] among the parameters."""
    bias: int | None
    """Index of b [out]; None if there is none, or it is not trained."""
    input: Tensor
    """x [.., in], without graph."""
    output: Edge
    """y [.., out] as it was returned."""
    num_outputs: int


class LayerWatch(TorchFunctionMode):
    """Notes the calls of layers inside the context.

    Args:
        tensors: The parameters.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[LinearCall] = []
        self._index = {id(t): k for k, t in enumerate(tensors)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.linear and isinstance(out, Tensor) and out.requires_grad:
            self._linear(out, *args, **kwargs)
        return out

    def _linear(
        self, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        index = self._index.get(id(weight))
        if index is None:
            return
        with torch.no_grad():
            x = input.detach()
        self.calls.append(
            LinearCall(
                weight=index,
                bias=None if bias is None else self._index.get(id(bias)),
                input=x,
                output=edge(out),
                num_outputs=out.shape[-1],
            )
        )
