"""Reverse mode: `torch.autograd.grad` without what it loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import has_torch_function

try:
    from torch._vmap_internals import _vmap
    from torch.autograd.graph import _engine_run_backward as _run
except ImportError:  # torch's own, and may move
    _run = None  # type: ignore[assignment]


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    materialize_grads: bool = False,
    is_grads_batched: bool = False,
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad`, to the bit.

    torch's loads sympy to compare the shapes of outputs and cotangents, which may be symbolic under
    torch.compile: 1.8 s of every process that takes a product. The engine compares them again.

    Args:
        outputs: Tensors or gradient edges, or one of them.
        inputs: The same.
        grad_outputs: Cotangents, one an output, of its shape; None: the outputs are scalars.
        retain_graph: Keep the graph; by default, if `create_graph`.
        create_graph: Make the result differentiable.
        allow_unused: None for an input that the outputs do not depend on, instead of an error.
        materialize_grads: Zeros for it.
        is_grads_batched: Cotangents have a leading axis, and so has the result.
    """
    heads, leaves, seeds = _several(outputs), _several(inputs), _several(grad_outputs)
    tensors = [x for x in (*heads, *leaves, *seeds) if isinstance(x, Tensor)]
    is_plain = (
        grad_outputs is not None
        and not (is_grads_batched and any(isinstance(x, GradientEdge) for x in heads))
        and not (materialize_grads and any(isinstance(x, GradientEdge) for x in leaves))
        and bool(leaves)
        and len(seeds) == len(heads)
        and all(isinstance(s, Tensor) for s in seeds)
        and not has_torch_function(tensors)
        and not any(x.is_nested for x in tensors)
    )
    if _run is None or not is_plain:
        return torch.autograd.grad(
            outputs,
            inputs,
            grad_outputs,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=allow_unused,
            materialize_grads=materialize_grads,
            is_grads_batched=is_grads_batched,
        )
    for head, seed in zip(heads, seeds):
        shape = seed.shape[1:] if is_grads_batched else seed.shape
        if isinstance(head, Tensor) and head.shape != shape:  # the engine would expand it
            raise RuntimeError(f"a cotangent of shape {shape} for an output of {head.shape}")
    keep = create_graph if retain_graph is None else retain_graph
    unused = materialize_grads if allow_unused is None else allow_unused

    def run(seeds: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _run(heads, seeds, keep, create_graph, leaves, unused, accumulate_grad=False)

    if is_grads_batched:
        run = _vmap(run, 0, 0, allow_none_pass_through=True)
    found = run(seeds)
    if not materialize_grads:
        return found
    return tuple(
        torch.zeros_like(x, requires_grad=create_graph) if g is None else g
        for g, x in zip(found, leaves)
    )


def _several(values: Any) -> tuple[Any, ...]:
    if values is None:
        return ()
    is_one = isinstance(values, (Tensor, GradientEdge))
    return (values,) if is_one else tuple(values)
