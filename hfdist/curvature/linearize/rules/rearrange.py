"""Operations that are linear in one argument: views, sums, gathering, pooling by means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfdist.curvature.linearize.call import Call, Map, NoDerivative, Unsupported, zeros_like
from hfdist.curvature.linearize.rules.table import can_hold, rule

aten = torch.ops.aten


@rule(
    "permute", "transpose", "t", "expand", "slice",
    "select", "squeeze", "unsqueeze", "alias", "diagonal", "unfold",
    "split", "split_with_sizes", "unbind", "unsafe_split",
    "unsafe_split_with_sizes", "_to_copy",
)  # fmt: skip
def _view(call: Call) -> Map:
    call.aliases = True
    return _same_operation(call)


@rule("view", "_unsafe_view", "_reshape_alias")
def _reshape(call: Call) -> Map:
    if call.out.dtype != call.args[0].dtype:
        raise Unsupported(f"{call.func} reads the bits as another dtype")
    call.aliases = True
    shape = call.out.shape
    # A tangent may lie otherwise in memory than its value.
    return lambda t, free: t[0].reshape(shape)


@rule(
    "clone", "neg", "sum", "mean", "flip", "roll", "repeat", "cumsum", "tril", "triu", "index_select",
    "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "reflection_pad1d", "reflection_pad2d", "im2col", "col2im", "gather",
    "index",
)  # fmt: skip
def _same_operation(call: Call) -> Map:
    """The operation itself, on the tangent; in place only where nobody reads that again."""
    call.only(0)
    func, rest, kwargs, writes = call.func, call.args[1:], call.kwargs, call.in_place
    # An operation in place may change shape and strides alone, of a tensor that other tangents are views of.
    moves = call.aliases

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        x = t[0]
        if writes:
            is_own = moves or can_hold(x, free[0], x.shape, x.dtype)
            x = x.detach() if is_own else x.clone()
        return func(x, *rest, **kwargs)

    return f


@rule("cat", "stack", reads_no_constant=True)
def _join(call: Call) -> Map:
    func, parts, rest, kwargs = call.func, call.args[0], call.args[1:], call.kwargs
    places = [call.place((0, i)) for i in range(len(parts))]
    zeros = [None if p is not None else zeros_like(x) for p, x in zip(places, parts)]

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        return func([z if p is None else t[p] for p, z in zip(places, zeros)], *rest, **kwargs)

    return f


@rule("copy", reads_no_constant=True)
def _copy(call: Call) -> Map:
    target, p = call.args[0], call.place(1)
    shape, dtype = target.shape, target.dtype
    if p is None:  # what is copied does not depend on the parameters
        return lambda t, free: torch.zeros(shape, dtype=dtype, device=target.device)
    call.aliases = True
    return lambda t, free: t[p].to(dtype).expand(shape)


@rule("masked_fill")
def _masked_fill(call: Call) -> Map:
    call.only(0)
    mask = call.args[1]
    return lambda t, free: t[0].masked_fill(mask, 0.0)


@rule("where")
def _where(call: Call) -> Map:
    call.only(1, 2)
    if len(call.args) != 3:
        raise Unsupported(str(call.func))
    condition = call.args[0]
    pa, pb = call.place(1), call.place(2)
    zero = torch.zeros((), dtype=call.out.dtype, device=call.out.device)

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        return torch.where(condition, zero if pa is None else t[pa], zero if pb is None else t[pb])

    return f


@rule("index_put")
def _index_put(call: Call) -> Map:
    call.only(0, 2)
    target, indices, values = call.args[:3]
    accumulate = bool(call.arg(3, False))
    pt, pv = call.place(0), call.place(2)
    zero = torch.zeros_like(values) if pv is None else None
    shape, dtype, device = target.shape, target.dtype, target.device

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        start = torch.zeros(shape, dtype=dtype, device=device) if pt is None else t[pt]
        return aten.index_put(start, indices, zero if pv is None else t[pv], accumulate)

    return f


@rule("embedding")
def _embedding(call: Call) -> Map:
    call.only(0)
    indices, padding = call.args[1], call.arg(2, -1)
    if call.arg(3, False):
        raise NoDerivative("embedding with scale_grad_by_freq returns no gradient")
    # The row of the padding has no gradient.
    mask = None if padding < 0 else (indices != padding).unsqueeze(-1).to(call.args[0].dtype)

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        out = aten.embedding(t[0], indices)
        return out if mask is None else out.mul_(mask)

    return f
