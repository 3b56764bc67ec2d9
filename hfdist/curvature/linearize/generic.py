"""The derivative of any operation that autograd differentiates twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.overrides import enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from hfdist.curvature.linearize.call import Call, Map, Unsupported


class _PassThrough(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd at work, also where a recorder below it was just called."""
    try:
        reentrant = enable_reentrant_dispatch()
        reentrant.__enter__()
    except RuntimeError:  # in no recorder: nothing to restore
        yield
        return
    try:
        with _PassThrough():  # torch expects a mode where it restores one
            yield
    finally:
        reentrant.__exit__(None, None, None)


def generic(call: Call) -> Map:
    """v -> Jv of one operation by double backward: J'w is linear in w, and its derivative along v is Jv.

    The operation is evaluated once more, on detached inputs, so its result must be no random one.

    Raises:
        Unsupported: It is not differentiable twice, or random.
    """
    if torch.Tag.nondeterministic_seeded in call.func.tags:
        raise Unsupported(f"{call.func} is random")
    if call.in_place:
        raise Unsupported(f"{call.func} has no rule")
    copies: dict[int, Tensor] = {}
    inputs: list[Tensor] = []

    def copied(x: Any) -> Any:
        if any(x is y for y in call.inputs):
            if id(x) not in copies:
                copies[id(x)] = x.detach().requires_grad_()
            return copies[id(x)]
        return x.detach() if isinstance(x, Tensor) else x

    with _autograd(), torch.enable_grad():
        args, kwargs = tree_map(copied, (list(call.args), dict(call.kwargs)))
        inputs = [copies[id(x)] for x in call.inputs]
        out = call.func(*args, **kwargs)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        curved = [k for k, y in enumerate(outs) if isinstance(y, Tensor) and y.requires_grad]
        unique = list({id(x): x for x in inputs}.values())
        w = [torch.zeros_like(outs[k], requires_grad=True) for k in curved]
        Jtw = grad([outs[k] for k in curved], unique, w, create_graph=True, allow_unused=True)
    used = [k for k, g in enumerate(Jtw) if g is not None and g.requires_grad]
    graph = [Jtw[k] for k in used]
    # A tensor that stands in two places has the same tangent in both.
    first_place = [next(i for i, x in enumerate(inputs) if x is u) for u in unique]
    call.kept += [x for x in call.inputs]

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        results: list[Tensor | None] = [
            torch.zeros_like(y) if isinstance(y, Tensor) and y.is_floating_point() else None
            for y in outs
        ]
        if used:
            v = [t[first_place[k]] for k in used]
            with _autograd():
                Jv = grad(graph, w, v, retain_graph=True, allow_unused=True)
            for k, y in zip(curved, Jv):
                if y is not None:
                    results[k] = y.detach()
        return tuple(results)

    return f
