"""Softmax, normalisation, maximum pooling: fused backward kernels that serve forwards, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfdist.curvature.linearize.call import Call, Map, Unsupported
from hfdist.curvature.linearize.rules.table import rule

aten = torch.ops.aten


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


# (The running statistics are copied where the map needs them; in training, the operation moves them.)
@rule("native_batch_norm", "cudnn_batch_norm", reads_no_constant=True)
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


@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool(call: Call) -> Map:
    call.constant = {1}
    indices = call.result(1)
    axis = -3 if "3d" in call.func._schema.name else -2

    def f(t: Sequence[Tensor], free: Sequence[bool]) -> Any:
        flat = t[0].flatten(axis)
        return flat.gather(-1, indices.flatten(axis)).view(indices.shape), None

    return f
