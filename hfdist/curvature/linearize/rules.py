"""Derivatives of operations, by name: the table that the recorder looks them up in.

A rule takes a `Call` and returns its map of tangents. What does not depend on the tangents is computed
once, in the rule; the map then runs fused kernels, in place where its argument is free. An operation
without a rule has the generic derivative, which is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfdist.curvature.linearize.call import Call, Map, Unsupported, zeros_like

aten = torch.ops.aten
Rule = Callable[[Call], Map]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under names of operations."""

    def enter(f: Rule) -> Rule:
        RULES.update({f"aten::{name}": f for name in names})
        return f

    return enter


# -- linear in their first argument --------------------------------------------------------------------


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "slice",
    "select", "squeeze", "unsqueeze", "alias", "diagonal", "unfold", "narrow", "view_as", "movedim",
    "split", "split_with_sizes", "unbind", "chunk", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes", "contiguous", "_to_copy", "lift_fresh",
)  # fmt: skip
def _view(call: Call) -> Map:
    call.aliases = True
    return _same_operation(call)


@rule(
    "clone", "neg", "sum", "mean", "flip", "roll", "repeat", "cumsum", "tril", "triu", "index_select",
    "constant_pad_nd", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d", "im2col", "col2im", "pixel_shuffle", "pixel_unshuffle", "gather", "embedding",
    "index", "trace", "rot90", "real",
)  # fmt: skip
def _same_operation(call: Call) -> Map:
    """The operation itself, on the tangent."""
    call.only(0)
    func, rest, kwargs = call.func, call.args[1:], call.kwargs

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        return func(t[0], *rest, **kwargs)

    return f


@rule("view.dtype", "view_as_complex", "view_as_real")
def _unsupported(call: Call) -> Map:
    raise Unsupported(f"{call.func}")


@rule("cat", "stack")
def _join(call: Call) -> Map:
    func, parts, rest, kwargs = call.func, call.args[0], call.args[1:], call.kwargs
    places = [call.place((0, i)) for i in range(len(parts))]
    zeros = [None if p is not None else zeros_like(x) for p, x in zip(places, parts)]

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        return func([z if p is None else t[p] for p, z in zip(places, zeros)], *rest, **kwargs)

    return f


@rule("copy")
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


# -- sums and products -----------------------------------------------------------------------------


def _added(call: Call, factor_a: float, factor_b: float) -> Map:
    """factor_a a + factor_b b, broadcast to the result's shape."""
    pa, pb = call.place(0), call.place(1)
    shape, dtype = call.out.shape, call.out.dtype

    def alone(p: int, factor: float, t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        x = t[p]
        if factor != 1.0:
            x = x.mul_(factor) if free[p] else x * factor
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
        elif free[pa] and a.shape == shape and a.dtype == dtype:
            return a.add_(b, alpha=factor_b)
        if factor_b == 1.0 and free[pb] and b.shape == shape and b.dtype == dtype:
            return b.add_(a)
        return torch.add(a, b, alpha=factor_b)

    return f


@rule("add")
def _add(call: Call) -> Map:
    return _added(call, 1.0, call.kwargs.get("alpha", 1))


@rule("sub")
def _sub(call: Call) -> Map:
    return _added(call, 1.0, -call.kwargs.get("alpha", 1))


@rule("rsub")
def _rsub(call: Call) -> Map:
    return _added(call, -call.kwargs.get("alpha", call.arg(2, 1)), 1.0)


def _scaled(p: int, factor: Any, out: Tensor) -> Map:
    """factor * tangent, of the output's shape."""
    shape, dtype = out.shape, out.dtype

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        x = t[p]
        if free[p] and x.shape == shape and x.dtype == dtype:
            return x.mul_(factor)
        x = x * factor
        return x if x.shape == shape else x.expand(shape)

    return f


@rule("mul")
def _mul(call: Call) -> Map:
    pa, pb = call.place(0), call.place(1)
    if pb is None:
        b = call.value(1) if isinstance(call.args[1], Tensor) else call.args[1]
        return _scaled(pa, b, call.out)  # type: ignore[arg-type]
    if pa is None:
        a = call.value(0) if isinstance(call.args[0], Tensor) else call.args[0]
        return _scaled(pb, a, call.out)
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
        return _scaled(pa, inverse, call.out)  # type: ignore[arg-type]
    minus = -call.result() * inverse  # d(a/b)/db
    if pa is None:
        return _scaled(pb, minus, call.out)
    return lambda t, free: torch.addcmul(t[pa] * inverse, minus, t[pb])


@rule("addcmul")
def _addcmul(call: Call) -> Map:
    value = call.kwargs.get("value", 1)
    p0, pa, pb = (call.place(k) for k in range(3))
    a, b = call.value(1), call.value(2)
    shape = call.out.shape

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        parts = [] if p0 is None else [t[p0]]
        parts += [] if pa is None else [t[pa] * b * value]
        parts += [] if pb is None else [a * t[pb] * value]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.expand(shape)

    return f


# -- matrix products -------------------------------------------------------------------------------


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


# -- element by element ----------------------------------------------------------------------------


def _by_backward_kernel(backward: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Rule:
    """Element-wise functions whose backward kernel t -> f'(x) t reads the output."""

    def enter(call: Call) -> Map:
        y = call.result()
        dtype = y.dtype

        def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
            out = t[0] if free[0] and t[0].dtype == dtype and t[0].is_contiguous() else None
            return backward(t[0], y, out)

        return f

    return enter


def _threshold(t: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return aten.threshold_backward(t, y, 0)
    return aten.threshold_backward.grad_input(t, y, 0, grad_input=out)


def _sigmoid(t: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return aten.sigmoid_backward(t, y)
    return aten.sigmoid_backward.grad_input(t, y, grad_input=out)


def _tanh(t: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return aten.tanh_backward(t, y)
    return aten.tanh_backward.grad_input(t, y, grad_input=out)


RULES["aten::relu"] = _by_backward_kernel(_threshold)
RULES["aten::sigmoid"] = _by_backward_kernel(_sigmoid)
RULES["aten::tanh"] = _by_backward_kernel(_tanh)


def _by_slope(slope: Callable[[Call], Tensor]) -> Rule:
    """Element-wise functions whose slope is worth keeping: a product is then one multiplication."""

    def enter(call: Call) -> Map:
        call.only(0)
        return _scaled(0, slope(call), call.out)

    return enter


def _ones(x: Tensor) -> Tensor:
    return torch.ones_like(x)


def _kernel_slope(backward: Any) -> Callable[[Call], Tensor]:
    """f'(x) by the backward kernel at one; it takes the function's own further arguments."""

    def slope(call: Call) -> Tensor:
        x = call.value(0)
        return backward(_ones(x), x, *call.args[1:], **call.kwargs)

    return slope


for _name in ("gelu", "silu", "mish", "hardswish", "hardsigmoid"):
    RULES[f"aten::{_name}"] = _by_slope(_kernel_slope(getattr(aten, f"{_name}_backward")))


@rule("softplus")
def _softplus(call: Call) -> Map:
    slope = aten.softplus_backward(
        _ones(call.args[0]), call.value(0), call.arg(1, 1), call.arg(2, 20)
    )
    return _scaled(0, slope, call.out)


@rule("leaky_relu")
def _leaky_relu(call: Call) -> Map:
    x = call.value(0)
    return _scaled(0, torch.where(x > 0, 1.0, call.arg(1, 0.01)).to(x.dtype), call.out)


RULES["aten::exp"] = _by_slope(lambda c: c.result().clone() if c.in_place else c.result())
if True:  # slopes of x alone
    for _name, _slope in {
        "log": lambda x: 1.0 / x,
        "log1p": lambda x: 1.0 / (1.0 + x),
        "log2": lambda x: 1.0 / (x * 0.6931471805599453),
        "sqrt": lambda x: 0.5 / x.sqrt(),
        "rsqrt": lambda x: -0.5 * x.rsqrt() / x,
        "reciprocal": lambda x: -1.0 / x.square(),
        "square": lambda x: 2.0 * x,
        "sin": torch.cos,
        "cos": lambda x: -torch.sin(x),
        "abs": torch.sign,
        "erf": lambda x: 1.1283791670955126 * torch.exp(-x.square()),
        "expm1": torch.exp,
        "atan": lambda x: 1.0 / (1.0 + x.square()),
        "log_sigmoid_forward": lambda x: torch.sigmoid(-x),
    }.items():
        RULES[f"aten::{_name}"] = _by_slope(lambda c, s=_slope: s(c.value(0)))  # type: ignore[misc]


@rule("pow")
def _pow(call: Call) -> Map:
    call.only(0)
    n = call.args[1]
    x = call.value(0)
    return _scaled(0, n * x.pow(n - 1), call.out)


@rule("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(call: Call) -> Map:
    call.only(0)
    name, x = call.func._schema.name, call.value(0)
    low, high = call.arg(1), call.arg(2)
    if name == "aten::clamp_max":
        low, high = None, low
    elif name == "aten::hardtanh":
        low, high = (-1 if low is None else low), (1 if high is None else high)
    inside = torch.ones_like(x, dtype=torch.bool)
    # Torch's own derivatives: clamp's is one at a bound, hardtanh's is zero.
    strict = name == "aten::hardtanh"
    if low is not None:
        inside &= (x > low) if strict else (x >= low)
    if high is not None:
        inside &= (x < high) if strict else (x <= high)
    return _scaled(0, inside.to(x.dtype), call.out)


@rule("native_dropout")
def _native_dropout(call: Call) -> Map:
    p, train = call.args[1], call.arg(2)
    call.constant = {1}
    if not train or train is None:
        return lambda t, free: (t[0].clone(), None)
    mask, scale = call.result(1), (0.0 if p == 1 else 1.0 / (1.0 - p))
    return lambda t, free: (aten.native_dropout_backward(t[0], mask, scale), None)


# -- normalisation -----------------------------------------------------------------------------------


@rule("_softmax", "_safe_softmax")
def _softmax(call: Call) -> Map:
    y, dim, dtype = call.result(), call.args[1], call.args[0].dtype
    if y.dtype != dtype:
        raise Unsupported(f"{call.func} with a change of dtype")
    # diag(y) - yy' is symmetric, so that the backward kernel does forwards too.
    return lambda t, free: aten._softmax_backward_data(t[0], y, dim, dtype)


@rule("_log_softmax")
def _log_softmax(call: Call) -> Map:
    y, dim = call.result(), call.args[1]
    p = y.exp()
    return lambda t, free: t[0] - (p * t[0]).sum(dim, keepdim=True)


@rule("native_layer_norm")
def _layer_norm(call: Call) -> Map:
    call.constant = {1, 2}
    x, shape, weight, eps = call.value(0), call.args[1], call.args[2], call.args[4]
    mean, rstd = call.result(1), call.result(2)
    px, pw, pb = call.place(0), call.place(2), call.place(3)
    if weight is not None:
        weight = call.value(2)

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        out: Tensor | None = None
        if px is not None:
            # The normalisation's Jacobian is symmetric: its backward kernel, without the weight.
            tx = t[px] if t[px].is_contiguous() else t[px].contiguous()
            out = aten.native_layer_norm_backward(
                tx, x, shape, mean, rstd, None, None, [True, False, False]
            )[0]
            if weight is not None:
                out.mul_(weight)
        if pw is not None:
            affine = F.layer_norm(x, shape, t[pw], None if pb is None else t[pb], eps)
            out = affine if out is None else out.add_(affine)
        elif pb is not None:
            out = t[pb].expand(x.shape).clone() if out is None else out.add_(t[pb])
        return out, None, None

    return f


@rule("native_group_norm")
def _group_norm(call: Call) -> Map:
    call.constant = {1, 2}
    x, weight = call.value(0), call.args[1]
    n, c, hw, groups, eps = call.args[3:8]
    mean, rstd = call.result(1), call.result(2)
    px, pw, pb = (call.place(k) for k in range(3))
    per_channel = [1, -1] + [1] * (x.ndim - 2)
    if weight is not None:
        weight = call.value(1).reshape(per_channel)

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        out: Tensor | None = None
        if px is not None:
            out = aten.native_group_norm_backward(
                t[px].contiguous(), x, mean, rstd, None, n, c, hw, groups, [True, False, False]
            )[0]
            if weight is not None:
                out.mul_(weight)
        if pw is not None:
            affine = F.group_norm(x, groups, t[pw], None if pb is None else t[pb], eps)
            out = affine if out is None else out.add_(affine)
        elif pb is not None:
            tb = t[pb].reshape(per_channel)
            out = tb.expand(x.shape).clone() if out is None else out.add_(tb)
        return out, None, None

    return f


@rule("native_batch_norm", "cudnn_batch_norm")
def _batch_norm(call: Call) -> Map:
    call.constant = {1, 2, 3}
    x, weight = call.value(0), call.args[1]
    running_mean, running_var, training, _, eps = call.args[3:8]
    px, pw, pb = (call.place(k) for k in range(3))
    if weight is not None:
        weight = call.value(1)
    per_channel = [1, -1] + [1] * (x.ndim - 2)
    if training:
        axes = [k for k in range(x.ndim) if k != 1]
        var, mean = torch.var_mean(x, axes, correction=0)  # [C]
    else:
        mean, var = running_mean.clone(), running_var.clone()
    rstd = (var + eps).rsqrt()
    zero = torch.zeros_like(mean)
    scale = rstd if weight is None else rstd * weight  # [C]

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        out: Tensor | None = None
        if px is not None and training:
            # Symmetric but for the weight, like layer norm.
            out = aten.native_batch_norm_backward(
                t[px], x, None, None, None, mean, rstd, True, eps, [True, False, False]
            )[0]
            if weight is not None:
                out.mul_(weight.view(per_channel))
        elif px is not None:
            # One pass of the inference kernel: (t - 0) * scale + tb.
            tb = None if pb is None else t[pb]
            out = _affine(t[px], scale, zero if tb is None else tb, per_channel)
        if pw is not None:
            # + (x - mean) rstd tw (+ tb, where it is not in yet)
            tw = rstd * t[pw]
            shift = -mean * tw
            if pb is not None and (px is None or training):
                shift = shift + t[pb]
            if out is None:
                out = _affine(x, tw, shift, per_channel)
            else:
                out.addcmul_(x, tw.view(per_channel)).add_(shift.view(per_channel))
        elif pb is not None and (px is None or training):
            tb = t[pb].view(per_channel)
            out = tb.expand(x.shape).clone() if out is None else out.add_(tb)
        return out, None, None, None

    return f


def _affine(x: Tensor, scale: Tensor, shift: Tensor, per_channel: list[int]) -> Tensor:
    """x * scale + shift a channel."""
    return torch.addcmul(shift.view(per_channel), x, scale.view(per_channel))


# -- pooling -----------------------------------------------------------------------------------------


@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool(call: Call) -> Map:
    call.constant = {1}
    indices = call.result(1)
    axis = -3 if "3d" in call.func._schema.name else -2

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        flat = t[0].flatten(axis)
        return flat.gather(-1, indices.flatten(axis)).view(indices.shape), None

    return f
