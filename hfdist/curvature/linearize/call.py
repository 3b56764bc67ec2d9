"""One recorded operation, and what a rule for it may ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Map = Callable[[Sequence[Tensor], Sequence[bool]], Any]
"""(tangents of the inputs that have one, whether each may be overwritten) -> tangent of the output, or a
tuple of them, None where an output has none."""
Jacobian = Callable[[Sequence[Tensor]], list[Tensor | None]]
"""v -> Jv, a tensor an output; None for zero."""


def any_direction(like: Sequence[Tensor]) -> list[Tensor]:
    """A direction to check products along: not the generator's, which stays untouched."""
    return [torch.linspace(-1.0, 1.0, t.numel()).cos().view(t.shape).to(t) for t in like]


class Unsupported(Exception):
    """This forward pass cannot be linearized by replaying its operations."""


class Call:
    """An operation out = func(*args, **kwargs) with at least one input that depends on the parameters.

    Args:
        func: The operation, `torch.ops.aten.*.*`.
        args, kwargs, out: Of its evaluation. In place, `out` is args[0].
        is_tracked: Whether a tensor has a tangent.
    """

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        is_tracked: Callable[[Any], bool],
        in_place: bool,
    ) -> None:
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out
        self.in_place = in_place
        self.inputs: list[Tensor] = []
        """Inputs with a tangent, in the order of the map's arguments."""
        self._places: dict[
            Any, int
        ] = {}  # argument (or (argument, i) in a list) -> place in inputs
        for k, arg in [*enumerate(args), *kwargs.items()]:
            if isinstance(arg, (list, tuple)):
                for i, item in enumerate(arg):
                    self._add((k, i), item, is_tracked)
            else:
                self._add(k, arg, is_tracked)
        self.kept: list[Tensor] = []
        """Values that the map reads whenever it runs."""
        self.constant: set[int] = set()
        """Outputs without a tangent, which nobody is to differentiate through."""
        self.aliases = False
        """Whether the map's result may share memory with its input."""

    def _add(self, key: Any, arg: Any, is_tracked: Callable[[Any], bool]) -> None:
        if isinstance(arg, Tensor) and is_tracked(arg):
            self._places[key] = len(self.inputs)
            self.inputs.append(arg)

    @property
    def mixes_dtypes(self) -> bool:
        """Whether tensors of different floating point types meet in it."""
        tensors = [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]
        return len({x.dtype for x in tensors if x.is_floating_point() and x.ndim > 0}) > 1

    def arg(self, k: int, default: Any = None) -> Any:
        """Argument k, or its default."""
        return self.args[k] if k < len(self.args) else default

    def place(self, key: Any) -> int | None:
        """Where the tangent of an argument stands among the map's; None if it has none."""
        return self._places.get(key)

    def only(self, *keys: Any) -> None:
        """Check that no other argument has a tangent."""
        if not set(self._places) <= set(keys):
            raise Unsupported(f"{self.func}: a derivative in an unusual argument")

    def value(self, k: int) -> Tensor:
        """The value of argument k before the operation, for the map to read."""
        x = self.args[k]
        if self.in_place and k == 0:
            x = x.clone()
        self.kept.append(x)
        return x

    def result(self, k: int | None = None) -> Tensor:
        """The value of the output, for the map to read."""
        y = self.out if k is None else self.out[k]
        self.kept.append(y)
        return y


def zeros_like(x: Tensor) -> Tensor:
    """A zero tangent of x."""
    return torch.zeros_like(x, memory_format=torch.contiguous_format)
