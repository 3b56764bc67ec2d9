"""A recorded J, compiled by torch.compile: its elementary steps become few kernels.

What a forward pass keeps is new in every step, and a compiler takes what it finds in a program for
constants. So the kept values become arguments, and the same program of a later step finds the kernels of
the first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfdist.curvature.linearize.call import Jacobian, Unsupported, any_direction
from hfdist.curvature.linearize.program import Program

_kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}
_MOST_KERNELS = (
    32  # programs of a process; one that is never the same twice must not be compiled for ever
)


def compiled(program: Program, tensors: Sequence[Tensor]) -> Jacobian:
    """The same map v -> Jv. The first program of its kind takes seconds to a minute, later ones a trace.

    Args:
        program: Of a forward pass.
        tensors: The parameters.

    Raises:
        Unsupported: It cannot be traced or compiled; there may be no compiler on this machine.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import, and seldom needed

    v = [torch.zeros_like(t) for t in tensors]
    is_zero: list[bool] = []

    def J_without_zeros(*v: Tensor) -> list[Tensor]:
        Jv = program(v)
        is_zero[:] = [t is None for t in Jv]
        return [t for t in Jv if t is not None]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own deprecations
            graph = make_fx(J_without_zeros)(*v)
            kept = _lift(graph)
            key = (graph.code, *((x.shape, x.stride(), x.dtype, x.device) for x in [*kept, *v]))
            if key not in _kernels:
                if len(_kernels) >= _MOST_KERNELS:
                    raise Unsupported("this forward pass is another program every time")
                kernels = torch.compile(graph, fullgraph=True, dynamic=False)
                _check(kernels, kept, program, v)
                _kernels[key] = kernels
            kernels = _kernels[key]
    except Unsupported:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise Unsupported(f"torch.compile: {type(error).__name__}: {reason}") from error

    @torch.no_grad()
    def J(v: Sequence[Tensor]) -> list[Tensor | None]:
        found = iter(kernels(*kept, *v))
        return [None if zero else next(found) for zero in is_zero]

    return J


@torch.no_grad()
def _check(
    kernels: Callable[..., Any], kept: Sequence[Tensor], program: Program, like: Sequence[Tensor]
) -> None:
    """Compile by running, and compare with what was compiled."""
    v = any_direction(like)
    expected = [t for t in program(v) if t is not None]
    for t, e in zip(kernels(*kept, *v), expected, strict=True):
        if not float((t - e).norm()) <= math.sqrt(torch.finfo(e.dtype).eps) * float(e.norm()):
            raise Unsupported("the compiled program is another one")


def _lift(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into its first arguments; returns them."""
    nodes = graph.graph.nodes
    first = next(iter(nodes))
    arguments: dict[str, torch.fx.Node] = {}
    for node in list(nodes):
        if node.op == "get_attr":
            name = str(node.target)
            if name not in arguments:
                with graph.graph.inserting_before(first):
                    arguments[name] = graph.graph.placeholder(f"kept_{len(arguments)}")
            node.replace_all_uses_with(arguments[name])
            graph.graph.erase_node(node)
    kept = [getattr(graph, name).detach() for name in arguments]
    for name in arguments:
        delattr(graph, name)
    graph.recompile()
    return kept
