"""J by torch.func.linearize: the forward pass on dual numbers, traced once, with what does not depend on
the tangents computed beforehand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from hfdist.curvature.dispatch import Watch
from hfdist.curvature.linearize.call import Jacobian, Unsupported, any_direction


def by_torch(
    outputs_at: Callable[[Sequence[Tensor]], list[Tensor]],
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> Jacobian:
    """v -> Jv at the parameters' present values; costs two more forward passes, a trace and a check.

    Args:
        outputs_at: The outputs z with other tensors in the parameters' place.
        tensors: The parameters.
        outputs: z, attached to the parameters' graph.

    Raises:
        Unsupported: An operation is random (traced, it would draw other numbers than the loss has seen),
            has no forward derivative, or cannot be traced; or the result is wrong, as with circular
            padding, which writes into what the trace takes for a constant.
    """

    def traced(*theta: Tensor) -> list[Tensor]:
        with _NothingRandom():
            return outputs_at(theta)

    primals = [t.detach().requires_grad_() for t in tensors]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.fx's own, about the constants' names
            _, jvp = torch.func.linearize(traced, *primals)
    except Unsupported:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise Unsupported(f"torch.func.linearize: {type(error).__name__}: {reason}") from error

    @torch.no_grad()
    def J(v: Sequence[Tensor]) -> list[Tensor | None]:
        return list(jvp(*v))

    if not _is_adjoint(J, tensors, outputs):
        raise Unsupported("torch.func.linearize: its product is not that of the backward pass")
    return J


def _is_adjoint(J: Jacobian, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether |Jv|^2 is v' J' (Jv), J' by the backward pass, for some v."""
    v = any_direction(tensors)
    Jv = [torch.zeros_like(z) if t is None else t for t, z in zip(J(v), outputs)]
    JtJv = grad(list(outputs), list(tensors), Jv, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        squared = sum(float(t.double().square().sum()) for t in Jv)
        other = sum(float((a * b).double().sum()) for a, b in zip(v, JtJv) if b is not None)
    tolerance = math.sqrt(torch.finfo(tensors[0].dtype).eps)
    return math.isclose(squared, other, rel_tol=tolerance, abs_tol=1e-30)


class _NothingRandom(Watch):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unsupported(f"{func} is random")
        return func(*args, **(kwargs or {}))
