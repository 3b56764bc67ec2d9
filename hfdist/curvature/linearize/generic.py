"""The derivative of any operation that autograd differentiates twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hfdist.curvature.linearize.call import Call, Unsupported
from hfdist.curvature.reverse import grad
from hfdist.devices import is_out_of_memory


class generic:
    """v -> Jv of one operation by double backward: J'w is linear in w, and its derivative along v is Jv.

    The operation is evaluated once more, on detached inputs, so its result must be no random one.

    Raises:
        Unsupported: (also from the first use) It is not differentiable twice, or random.
    """

    def __init__(self, call: Call) -> None:
        if torch.Tag.nondeterministic_seeded in call.func.tags:
            raise Unsupported(f"{call.func} is random")
        call.out = None  # not needed, and large
        self._call: Call | None = call
        call.kept += call.inputs

    def prepare(self) -> None:
        """Build what every use shares. (Not at once: much that is recorded is never used.)"""
        call, self._call = self._call, None
        if call is None:
            return
        try:
            self._build(call)
        except Exception as e:
            if is_out_of_memory(e):
                raise
            raise Unsupported(f"{call.func}: {e}") from e

    def _build(self, call: Call) -> None:
        copies: dict[int, Tensor] = {}

        def copied(x: Any) -> Any:
            if any(x is y for y in call.inputs):
                if id(x) not in copies:
                    copies[id(x)] = x.detach().requires_grad_()
                return copies[id(x)]
            return x.detach() if isinstance(x, Tensor) else x

        with torch.enable_grad():
            args, kwargs = tree_map(copied, (list(call.args), dict(call.kwargs)))
            inputs = [copies[id(x)] for x in call.inputs]
            if call.in_place:
                args[0] = args[0].clone()  # a leaf, or what other products still need
            out = call.func(*args, **kwargs)
            outs = list(out) if isinstance(out, (tuple, list)) else [out]
            self._outs = [
                y.detach() if isinstance(y, Tensor) and y.is_floating_point() else None
                for y in outs
            ]
            self._curved = [
                k for k, y in enumerate(outs) if isinstance(y, Tensor) and y.requires_grad
            ]
            unique = list(copies.values())
            curved = [outs[k] for k in self._curved]
            # (Ones: at zero, logcumsumexp's backward pass, which takes a logarithm, has no derivative.)
            self._w = [torch.ones_like(y, requires_grad=True) for y in curved]
            Jtw = grad(curved, unique, self._w, create_graph=True, allow_unused=True)
        used = [k for k, g in enumerate(Jtw) if g is not None and g.requires_grad]
        self._graph = [Jtw[k] for k in used]
        # A tensor that stands in two places has the same tangent in both.
        places = [next(i for i, x in enumerate(inputs) if x is u) for u in unique]
        self._used = [places[k] for k in used]

    def __call__(self, t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        self.prepare()
        results = [None if y is None else torch.zeros_like(y) for y in self._outs]
        if self._used:
            v = [t[i] for i in self._used]
            Jv = grad(self._graph, self._w, v, retain_graph=True, allow_unused=True)
            for k, y in zip(self._curved, Jv):
                if y is not None:
                    results[k] = y.detach()
        return tuple(results)
