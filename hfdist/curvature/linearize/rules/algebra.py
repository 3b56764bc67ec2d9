"""Sums, products, matrix products, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfdist.curvature.linearize.call import Call, Map, Unsupported
from hfdist.curvature.linearize.rules.table import can_hold, rule, scaled

aten = torch.ops.aten


def _added(call: Call, factor_a: float, factor_b: float) -> Map:
    """factor_a a + factor_b b, broadcast to the result's shape."""
    pa, pb = call.place(0), call.place(1)
    shape, dtype = call.out.shape, call.out.dtype

    def alone(p: int, factor: float, t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        x = t[p]
        if factor != 1.0:
            x = x.mul_(factor) if can_hold(x, free[p], x.shape, x.dtype) else x * factor
        return x.to(dtype).expand(shape)

    if pb is None or pa is None:
        call.aliases = True
        return lambda t, free: (
            alone(pa, factor_a, t, free) if pa is not None else alone(pb, factor_b, t, free)  # type: ignore[arg-type]
        )

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        a, b = t[pa], t[pb]
        if factor_a != 1.0:
            a = a * factor_a
        elif can_hold(a, free[pa], shape, dtype):
            return a.add_(b, alpha=factor_b)
        if factor_b == 1.0 and can_hold(b, free[pb], shape, dtype):
            return b.add_(a)
        return torch.add(a, b, alpha=factor_b)

    return f


@rule("add", reads_no_constant=True)
def _add(call: Call) -> Map:
    return _added(call, 1.0, call.kwargs.get("alpha", 1))


@rule("sub", reads_no_constant=True)
def _sub(call: Call) -> Map:
    return _added(call, 1.0, -call.kwargs.get("alpha", 1))


@rule("rsub", reads_no_constant=True)
def _rsub(call: Call) -> Map:
    return _added(call, -call.kwargs.get("alpha", call.arg(2, 1)), 1.0)


@rule("mul")
def _mul(call: Call) -> Map:
    pa, pb = call.place(0), call.place(1)
    if pb is None:
        b = call.value(1) if isinstance(call.args[1], Tensor) else call.args[1]
        return scaled(pa, b, call.out)  # type: ignore[arg-type]
    if pa is None:
        a = call.value(0) if isinstance(call.args[0], Tensor) else call.args[0]
        return scaled(pb, a, call.out)
    a, b = call.value(0), call.value(1)
    return lambda t, free: torch.addcmul(t[pa] * b, a, t[pb])


@rule("div")
def _div(call: Call) -> Map:
    if call.kwargs.get("rounding_mode") is not None:
        raise Unsupported(str(call.func))
    pa, pb = call.place(0), call.place(1)
    b = call.value(1) if isinstance(call.args[1], Tensor) else call.args[1]
    inverse = 1.0 / b
    if pb is None:
        return scaled(pa, inverse, call.out)  # type: ignore[arg-type]
    minus = -call.result() * inverse  # d(a/b)/db
    if pa is None:
        return scaled(pb, minus, call.out)
    return lambda t, free: torch.addcmul(t[pa] * inverse, minus, t[pb])


@rule("addcmul")
def _addcmul(call: Call) -> Map:
    value = call.kwargs.get("value", 1)
    p0, pa, pb = (call.place(k) for k in range(3))
    a, b = call.value(1), call.value(2)
    shape = call.out.shape
    call.aliases = pa is None and pb is None  # the result's tangent is the first argument's

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        parts = [] if p0 is None else [t[p0]]
        parts += [] if pa is None else [t[pa] * b * value]
        parts += [] if pb is None else [a * t[pb] * value]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.expand(shape)

    return f


@rule("mm", "bmm", "mv", "dot")
def _matrix_product(call: Call) -> Map:
    pa, pb = call.place(0), call.place(1)
    a = None if pb is None else call.value(0)
    b = None if pa is None else call.value(1)
    func = call.func
    accumulate: Any = {"aten::mm": Tensor.addmm_, "aten::bmm": Tensor.baddbmm_}.get(
        func._schema.name
    )

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        if pa is None:
            return func(a, t[pb])  # type: ignore[index]
        out = func(t[pa], b)
        if pb is None:
            return out
        if accumulate is None:
            return out.add_(func(a, t[pb]))
        return accumulate(out, a, t[pb])

    return f


@rule("addmm", "baddbmm")
def _added_matrix_product(call: Call) -> Map:
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    if alpha != 1:
        raise Unsupported(str(call.func))
    batched = call.func._schema.name == "aten::baddbmm"
    product = torch.bmm if batched else torch.mm
    added = torch.baddbmm if batched else torch.addmm
    accumulate = Tensor.baddbmm_ if batched else Tensor.addmm_
    p0, pa, pb = (call.place(k) for k in range(3))
    a = None if pb is None else call.value(1)
    b = None if pa is None else call.value(2)
    shape = call.out.shape

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        out: Tensor | None = None
        if p0 is not None and beta != 0:
            bias = t[p0] if beta == 1 else t[p0] * beta
            if pa is not None:
                out = added(bias, t[pa], b)  # type: ignore[arg-type]
            elif pb is not None:
                return added(bias, a, t[pb])  # type: ignore[arg-type]
            else:
                return bias.expand(shape).clone()
        elif pa is not None:
            out = product(t[pa], b)  # type: ignore[arg-type]
        elif pb is not None:
            return product(a, t[pb])  # type: ignore[arg-type]
        return out if pb is None else accumulate(out, a, t[pb])  # type: ignore[arg-type,return-value]

    return f


@rule("convolution")
def _convolution(call: Call) -> Map:
    call.only(0, 1, 2)
    how = call.args[3:]  # stride, padding, dilation, transposed, output_padding, groups
    px, pw, pb = (call.place(k) for k in range(3))
    x = None if pw is None else call.value(0)
    w = None if px is None else call.value(1)
    shape = call.out.shape
    channels = [1, -1] + [1] * (len(shape) - 2)

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        bias = None if pb is None else t[pb]
        if px is None and pw is None:
            return bias.view(channels).expand(shape).clone()  # type: ignore[union-attr]
        if pw is None:
            return aten.convolution(t[px], w, bias, *how)  # type: ignore[index]
        out = aten.convolution(x, t[pw], bias, *how)
        if px is None:
            return out
        return out.add_(aten.convolution(t[px], w, None, *how))

    return f
