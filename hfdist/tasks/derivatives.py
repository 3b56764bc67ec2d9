"""Derivatives of a network in its inputs, carried forward layer by layer, the first and the second.

One pass takes a point's value, its derivatives along the axes and either all second derivatives or their sum
(the forward Laplacian, Li et al. 2023, arXiv:2307.08214; Taylor mode where second derivatives stay apart). No
backward pass is nested in another, so that gradients and products cost what they cost for a network with
d + 2 times the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from hfdist.errors import TaskError

Model = Callable[[Any], Any]


def laplacian(
    model: Model, x: Tensor, coordinates: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Laplacian of a model of points.

    Args:
        model: Maps points [n, d] to [n, m], each point for itself: a module or function of linear layers,
            smooth activations, products, sums and rearrangements.
        x: Points [n, d].
        coordinates: The Laplacian's; None: all. (Of the coordinates t, x, y: 1, 2.)

    Returns:
        u [n, m], du/dx [n, d, m], sum of d2u/dx_k^2 over the coordinates [n, m].

    Raises:
        TaskError: The model uses a function of which no rule is known; it is named.
    """
    u = _along_axes(model, x, coordinates, collapsed=True)
    return u.value, u.first, u.second[:, 0]


def second_derivatives(model: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `laplacian`, with d2u/dx_k^2 [n, d, m] for every coordinate in place of their sum."""
    u = _along_axes(model, x, None, collapsed=False)
    return u.value, u.first, u.second


def _along_axes(model: Model, x: Tensor, coordinates: Sequence[int] | None, collapsed: bool) -> Jet:
    if x.ndim != 2:
        raise TaskError(f"points have shape {list(x.shape)}: they must be [n, d]")
    n, d = x.shape
    axes = torch.eye(d, dtype=x.dtype, device=x.device).expand(n, d, d)
    none = x.new_zeros(n, 1 if collapsed else d, d)
    along = list(range(d) if coordinates is None else coordinates)
    u = model(Jet(torch.cat((x.unsqueeze(1), axes, none), 1), d, along if collapsed else None))
    if not isinstance(u, Jet):
        raise TaskError("the model's result does not depend on its input")
    return u


class Jet:
    """A tensor [n, ..] with its derivatives along d axes.

    Args:
        all: [n, 1 + d + s, ..]: the value, d derivatives, and s = d second derivatives or, collapsed, their
            sum, s = 1.
        d: Number of axes.
        along: Collapsed: which second derivatives the sum is of.

    It goes where a tensor goes: functions of torch come to `__torch_function__`, methods are looked up among
    torch's.
    """

    def __init__(self, all: Tensor, d: int, along: list[int] | None) -> None:
        self.all, self.d, self.along = all, d, along

    @property
    def value(self) -> Tensor:
        return self.all[:, 0]

    @property
    def first(self) -> Tensor:
        return self.all[:, 1 : 1 + self.d]

    @property
    def second(self) -> Tensor:
        return self.all[:, 1 + self.d :]

    def with_all(self, all: Tensor) -> Jet:
        return Jet(all, self.d, self.along)

    def made_of(self, value: Tensor, first: Tensor, second: Tensor) -> Jet:
        return self.with_all(torch.cat((value.unsqueeze(1), first, second), 1))

    def summed(self, products: Tensor) -> Tensor:
        """Products of derivatives along the axes [n, d, ..], for the second derivatives [n, s, ..]."""
        if self.along is None:
            return products
        if len(self.along) < self.d:
            products = products[:, self.along]
        return products.sum(1, keepdim=True)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is None:
            name = getattr(func, "__name__", str(func))
            raise TaskError(
                f"laplacian() and second_derivatives() have no rule for {name}: write the model with linear "
                "layers, elementwise functions, sums and products, or take derivatives by "
                "torch.autograd.grad or torch.func"
            )
        return rule(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(torch.Tensor, name)  # AttributeError: no tensor has it either
        if not callable(attribute):
            return getattr(self.value, name)  # shape, dtype, device
        return lambda *args, **kwargs: Jet.__torch_function__(attribute, (), (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Jet:
        return _linear(torch.Tensor.__getitem__, (self, index), {})

    def __add__(self, other: Any) -> Jet:
        return _sum(torch.add, (self, other), {})

    __radd__ = __add__

    def __sub__(self, other: Any) -> Jet:
        return _sum(torch.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Jet:
        return _sum(torch.add, (-self, other), {})

    def __neg__(self) -> Jet:
        return self.with_all(-self.all)

    def __mul__(self, other: Any) -> Jet:
        return _product(torch.mul, (self, other), {})

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Jet:
        return _quotient(torch.div, (self, other), {})

    def __rtruediv__(self, other: Any) -> Jet:
        return _quotient(torch.div, (other, self), {})

    def __pow__(self, exponent: float) -> Jet:
        return _elementwise(torch.pow, (self, exponent), {})

    def __matmul__(self, other: Any) -> Jet:
        return _linear(torch.matmul, (self, other), {})


# -- rules -------------------------------------------------------------------------------------------


def _jets(args: Any) -> list[Jet]:
    return [a for a in tree_leaves(args) if isinstance(a, Jet)]


def _linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    """Value and derivatives alike."""
    jets = _jets((args, kwargs))

    def of(*parts: Tensor) -> Tensor:
        items = iter(parts)
        a, k = tree_map(lambda x: next(items) if isinstance(x, Jet) else x, (args, kwargs))
        result: Tensor = func(*a, **k)
        return result

    return jets[0].with_all(vmap(of, in_dims=1, out_dims=1)(*(jet.all for jet in jets)))


def _layer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    """xW' + b, in one matrix product."""
    x, W = args[0], args[1]
    b = args[2] if len(args) > 2 else kwargs.get("bias")
    if not isinstance(x, Jet) or isinstance(W, Jet) or isinstance(b, Jet):
        raise TaskError("laplacian(): a layer's weights depend on the points")
    all = F.linear(x.all, W)
    return x.with_all(all) if b is None else _shifted(x.with_all(all), b)


def _shifted(x: Jet, constant: Any) -> Jet:
    """x + c: derivatives stay. (No write in place: the pass is replayed.)"""
    return x.with_all(torch.cat((x.all[:, :1] + _beside(constant, x), x.all[:, 1:]), 1))


def _beside(constant: Any, x: Jet) -> Any:
    """A constant as a factor or summand of [n, .., f] with one more axis."""
    is_full = isinstance(constant, Tensor) and constant.ndim >= x.all.ndim - 1
    return constant.unsqueeze(1) if is_full else constant


def _sum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    a, b = args[:2]
    factor = kwargs.get("alpha", 1) * (-1 if func in _DIFFERENCES else 1)
    if not isinstance(a, Jet):
        return _shifted(b.with_all(b.all * factor), a)
    if not isinstance(b, Jet):
        return _shifted(a, b * factor)
    return a.with_all(a.all + b.all * factor)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    """(ab)'' = a''b + 2a'b' + ab''."""
    a, b = args[:2]
    if not isinstance(a, Jet):
        a, b = b, a
    if not isinstance(b, Jet):
        return a.with_all(a.all * _beside(b, a))
    va, vb = a.all[:, :1], b.all[:, :1]
    mixed = 2.0 * a.summed(a.first * b.first)
    return a.made_of(
        a.value * b.value,
        a.first * vb + va * b.first,
        a.second * vb + mixed + va * b.second,
    )


def _quotient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    a, b = args[:2]
    if isinstance(b, Jet):
        return _product(torch.mul, (_elementwise(torch.reciprocal, (b,), {}), a), {})
    return a.with_all(a.all / _beside(b, a))


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    """f(u)' = f' u', f(u)'' = f'' u'^2 + f' u''."""
    x = args[0]
    v = x.value
    y, d1, d2 = _derivatives(func, v, args[1:], kwargs)
    d1, d2 = d1.unsqueeze(1), d2.unsqueeze(1)
    return x.made_of(y, d1 * x.first, d2 * x.summed(x.first.square()) + d1 * x.second)


def _derivatives(
    func: Any, v: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' at v: written out for the frequent ones, by backward passes for the others."""
    name = getattr(func, "__name__", "").rstrip("_")
    if name == "tanh":
        y = torch.tanh(v)
        d1 = 1.0 - y * y
        return y, d1, -2.0 * y * d1
    if name in ("sin", "cos"):
        s, c = torch.sin(v), torch.cos(v)
        return (s, c, -s) if name == "sin" else (c, -s, -c)
    if name == "exp":
        y = torch.exp(v)
        return y, y, y
    if name == "sigmoid":
        y = torch.sigmoid(v)
        d1 = y * (1.0 - y)
        return y, d1, d1 * (1.0 - 2.0 * y)
    kwargs = {k: x for k, x in kwargs.items() if k != "inplace"}
    one = torch.ones_like(v)

    def f(t: Tensor) -> Tensor:
        result: Tensor = func(t, *args, **kwargs)
        return result

    def df(t: Tensor) -> Tensor:
        result: Tensor = vjp(f, t)[1](one)[0]
        return result

    pulled: tuple[Any, ...] = vjp(df, v)
    return f(v), pulled[0], pulled[1](one)[0]


def _same(name: str) -> list[Any]:
    """A function and the method of its name, wherever torch has them."""
    return [getattr(owner, name) for owner in (torch, torch.Tensor, F) if hasattr(owner, name)]


_DIFFERENCES = set(_same("sub") + _same("subtract"))
_RULES: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Jet]] = {
    F.linear: _layer,
    **{
        f: _linear
        for name in (
            "matmul", "mm", "reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose",
            "movedim", "permute", "cat", "stack", "concat", "sum", "mean", "neg", "clone", "contiguous",
            "expand", "index_select", "select", "narrow", "dropout", "to", "double", "float",
        )
        for f in _same(name)
    },
    **{f: _sum for name in ("add", "sub", "subtract") for f in _same(name)},
    **{f: _product for name in ("mul", "multiply") for f in _same(name)},
    **{f: _quotient for name in ("div", "divide", "true_divide") for f in _same(name)},
    **{
        f: _elementwise
        for name in (
            "tanh", "sin", "cos", "exp", "sigmoid", "softplus", "silu", "gelu", "elu", "selu", "mish", "celu",
            "logsigmoid", "log", "log1p", "sqrt", "rsqrt", "pow", "square", "reciprocal", "atan", "arctan",
            "tan", "sinh", "cosh", "asinh", "erf", "relu", "leaky_relu", "abs", "softsign",
        )
        for f in _same(name)
    },
}  # fmt: skip
