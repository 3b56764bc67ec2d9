"""Functions of one tensor, element by element: their slope times the tangent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfdist.curvature.linearize.call import Call, Map
from hfdist.curvature.linearize.rules.table import RULES, Rule, can_hold, rule, scaled

aten = torch.ops.aten


def _by_backward_kernel(backward: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Rule:
    """Element-wise functions whose backward kernel t -> f'(x) t reads the output."""

    def enter(call: Call) -> Map:
        y = call.result()

        def f(t: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
            out = t[0] if can_hold(t[0], free[0], y.shape, y.dtype) else None
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


rule("relu", reads_result_only=True)(_by_backward_kernel(_threshold))
rule("sigmoid", reads_result_only=True)(_by_backward_kernel(_sigmoid))
rule("tanh", reads_result_only=True)(_by_backward_kernel(_tanh))


def _by_slope(slope: Callable[[Call], Tensor]) -> Rule:
    """Element-wise functions whose slope is worth keeping: a product is then one multiplication."""

    def enter(call: Call) -> Map:
        call.only(0)
        return scaled(0, slope(call), call.out)

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
    return scaled(0, slope, call.out)


@rule("leaky_relu")
def _leaky_relu(call: Call) -> Map:
    x = call.value(0)
    slope = aten.leaky_relu_backward(_ones(x), x, call.arg(1, 0.01), False)
    return scaled(0, slope, call.out)


rule("exp", reads_result_only=True)(_by_slope(lambda call: call.result()))
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {  # of x alone
    "log": lambda x: 1.0 / x,
    "log1p": lambda x: 1.0 / (1.0 + x),
    "log2": lambda x: 1.0 / (x * math.log(2.0)),
    "sqrt": lambda x: 0.5 / x.sqrt(),
    "rsqrt": lambda x: -0.5 * x.rsqrt() / x,
    "reciprocal": lambda x: -1.0 / x.square(),
    "square": lambda x: 2.0 * x,
    "sin": torch.cos,
    "cos": lambda x: -torch.sin(x),
    "abs": torch.sign,
    "erf": lambda x: 2.0 / math.sqrt(math.pi) * torch.exp(-x.square()),
    "expm1": torch.exp,
    "atan": lambda x: 1.0 / (1.0 + x.square()),
}


def _slope_of(name: str) -> Callable[[Call], Tensor]:
    return lambda call: _SLOPES[name](call.value(0))


for _name in _SLOPES:
    RULES[f"aten::{_name}"] = _by_slope(_slope_of(_name))


@rule("pow")
def _pow(call: Call) -> Map:
    call.only(0)
    n = call.args[1]
    x = call.value(0)
    slope = n * x.pow(n - 1)
    if isinstance(n, Tensor):
        slope = slope.masked_fill(n == 0, 0.0)  # not 0 * infinity, where x is 0
    elif n == 0:
        slope = torch.zeros_like(x)
    return scaled(0, slope, call.out)


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
    return scaled(0, inside.to(x.dtype), call.out)


@rule("native_dropout")
def _native_dropout(call: Call) -> Map:
    p, train = call.args[1], call.arg(2)
    call.constant = {1}
    if not train or train is None:
        return lambda t, free: (t[0].clone(), None)
    mask, scale = call.result(1), (0.0 if p == 1 else 1.0 / (1.0 - p))
    return lambda t, free: (aten.native_dropout_backward(t[0], mask, scale), None)
