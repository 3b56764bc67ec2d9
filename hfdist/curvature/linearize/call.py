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


class Unsupported(Exception):
    """This forward pass cannot be linearized by replaying its operations."""


class NoDerivative(Unsupported):
    """What autograd returns for this operation is no derivative, so that none can be replayed."""


class Call:
    """An operation out = func(*args, **kwargs) with at least one input that depends on the parameters.

    Args:
        func: The operation, `torch.ops.aten.*.*`.
        args, kwargs, out: Of its evaluation.
        is_tracked: Whether a tensor has a tangent.
        in_place: Whether it writes into args[0], which is then also its result.

    A rule is asked after the operation has run. Of an operation in place it sees the value from before
    as args[0] (a copy, see `keep_target`) and the value from after as the result.
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
        self.slots: list[int] = []
        """Where their tangents lie, before the operation."""
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

    def keep_target(self) -> None:
        """Put a copy in the place of args[0], which the operation is about to overwrite."""
        target = self.args[0]
        before = target.clone()
        self.args = (before, *self.args[1:])
        self.inputs = [before if x is target else x for x in self.inputs]

    def constants(self) -> list[Tensor]:
        """Tensors among the arguments that have no tangent."""
        return [
            x
            for x in tree_leaves((list(self.args), dict(self.kwargs)))
            if isinstance(x, Tensor) and not any(x is y for y in self.inputs) and x is not self.out
        ]

    def value(self, k: int) -> Tensor:
        """The value of argument k before the operation, for the map to read."""
        x = self.args[k]
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
