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
First = Tensor | Callable[[], Tensor]


def laplacian(
    model: Model, x: Tensor, coordinates: Sequence[int] | None = None, gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Laplacian of a model of points.

    Args:
        model: Maps points [n, d] to [n, m], each point for itself: a module or function of linear layers,
            smooth activations, products, sums and rearrangements.
        x: Points [n, d].
        coordinates: The Laplacian's; None: all. (Of the coordinates t, x, y: 1, 2. None of them, []: where
            the gradient alone is wanted.)
        gradient: Whether du/dx is wanted; where it is not, the last layers need not carry it.

    Returns:
        u [n, m], du/dx [n, d, m] (without `gradient` [n, 0, m]), sum of d2u/dx_k^2 over the coordinates
        [n, m].

    Raises:
        TaskError: The model uses a function of which no rule is known; it is named.
    """
    n = len(x)
    u = _along_axes(model, x, coordinates, collapsed=True)
    du = _full(u.first, n) if gradient else u.value.new_empty(n, 0, *u.value.shape[1:])
    return u.value, du, _full(u.second_or_zero, n)[:, 0]


def second_derivatives(model: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `laplacian`, with d2u/dx_k^2 [n, d, m] for every coordinate in place of their sum."""
    n = len(x)
    u = _along_axes(model, x, None, collapsed=False)
    return u.value, _full(u.first, n), _full(u.second_or_zero, n)


def _along_axes(model: Model, x: Tensor, coordinates: Sequence[int] | None, collapsed: bool) -> Jet:
    if x.ndim != 2:
        raise TaskError(f"points have shape {list(x.shape)}: they must be [n, d]")
    d = x.shape[1]
    along = list(range(d) if coordinates is None else coordinates)
    axes = torch.eye(d, dtype=x.dtype, device=x.device).unsqueeze(0)  # [1, d, d]: of every point
    u = model(Jet(x, axes, None, along if collapsed else None))
    if not isinstance(u, Jet):
        raise TaskError("the model's result does not depend on its input")
    return u


def _full(x: Tensor, n: int) -> Tensor:
    """Of every point, where it is the same for all."""
    return x if len(x) == n else x.expand(n, *x.shape[1:])


class Jet:
    """A tensor [n, ..] with its derivatives along d axes.

    Args:
        value: [n, ..].
        first: [n, d, ..], or [1, d, ..] where it is the same for all points; or a function that computes it
            where somebody asks.
        second: Second derivatives [n, d, ..] or, collapsed, their sum [n, 1, ..]; None for zero.
        along: Collapsed: which second derivatives the sum is of; None: they stay apart.

    It goes where a tensor goes: functions of torch come to `__torch_function__`, methods are looked up among
    torch's.
    """

    def __init__(
        self, value: Tensor, first: First, second: Tensor | None, along: list[int] | None
    ) -> None:
        self.value, self._first, self.second, self.along = value, first, second, along

    @property
    def first(self) -> Tensor:
        if not isinstance(self._first, Tensor):
            self._first = self._first()
        return self._first

    @property
    def second_or_zero(self) -> Tensor:
        if self.second is not None:
            return self.second
        first = self.first
        return torch.zeros_like(first if self.along is None else first[:, :1])

    def made_of(self, value: Tensor, first: First, second: Tensor | None) -> Jet:
        return Jet(value, first, second, self.along)

    def each(self, f: Callable[[Tensor], Tensor]) -> Jet:
        """f of value and derivatives alike."""
        second = None if self.second is None else f(self.second)
        return self.made_of(f(self.value), f(self.first), second)

    def summed(self, products: Tensor) -> Tensor | None:
        """Products of derivatives along the axes [n, d, ..], for the second derivatives; None for zero."""
        if self.along is None:
            return products
        if not self.along:
            return None
        if len(self.along) < products.shape[1]:
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
        return self.each(torch.neg)

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
    n = len(jets[0].value)

    def of(*parts: Tensor) -> Tensor:
        items = iter(parts)
        a, k = tree_map(lambda x: next(items) if isinstance(x, Jet) else x, (args, kwargs))
        result: Tensor = func(*a, **k)
        return result

    def derivatives(parts: Sequence[Tensor]) -> Tensor:
        result: Tensor = vmap(of, in_dims=1, out_dims=1)(*(_full(part, n) for part in parts))
        return result

    second = None
    if any(jet.second is not None for jet in jets):
        second = derivatives([jet.second_or_zero for jet in jets])
    value = of(*(jet.value for jet in jets))
    return jets[0].made_of(value, derivatives([jet.first for jet in jets]), second)


def _layer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    """xW' + b."""
    x, W = args[0], args[1]
    b = args[2] if len(args) > 2 else kwargs.get("bias")
    if not isinstance(x, Jet) or isinstance(W, Jet) or isinstance(b, Jet):
        raise TaskError("laplacian(): a layer's weights depend on the points")
    second = None if x.second is None else F.linear(x.second, W)
    return x.made_of(F.linear(x.value, W, b), lambda: F.linear(x.first, W), second)


def _beside(constant: Any, x: Jet) -> Any:
    """A constant as a factor of derivatives, which have one more axis than the value [n, .., f]."""
    is_full = isinstance(constant, Tensor) and constant.ndim >= x.value.ndim
    return constant.unsqueeze(1) if is_full else constant


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _sum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    a, b = args[:2]
    factor = kwargs.get("alpha", 1) * (-1 if func in _DIFFERENCES else 1)
    if not isinstance(a, Jet):
        b = b if factor == 1 else b.each(lambda t: t * factor)
        return b.made_of(b.value + a, b.first, b.second)
    if not isinstance(b, Jet):
        return a.made_of(a.value + (b if factor == 1 else b * factor), a.first, a.second)
    if factor != 1:
        b = b.each(lambda t: t * factor)
    return a.made_of(a.value + b.value, a.first + b.first, _added(a.second, b.second))


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    """(ab)'' = a''b + 2a'b' + ab''."""
    a, b = args[:2]
    if not isinstance(a, Jet):
        a, b = b, a
    if not isinstance(b, Jet):
        factor = _beside(b, a)
        second = None if a.second is None else a.second * factor
        return a.made_of(a.value * b, a.first * factor, second)
    va, vb = a.value.unsqueeze(1), b.value.unsqueeze(1)
    mixed = a.summed(2.0 * a.first * b.first)
    bent = _added(
        None if a.second is None else a.second * vb, None if b.second is None else va * b.second
    )
    return a.made_of(a.value * b.value, a.first * vb + va * b.first, _added(bent, mixed))


def _quotient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    a, b = args[:2]
    if isinstance(b, Jet):
        return _product(torch.mul, (_elementwise(torch.reciprocal, (b,), {}), a), {})
    return _product(torch.mul, (a, 1.0 / b), {})


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Jet:
    """f(u)' = f' u', f(u)'' = f'' u'^2 + f' u''."""
    x = args[0]
    y, d1, d2 = _derivatives(func, x.value, args[1:], kwargs)
    d1 = d1.unsqueeze(1)
    squares = x.summed(x.first.square()) if x.along != [] else None
    bent = None if squares is None else d2.unsqueeze(1) * squares
    second = None if x.second is None else d1 * x.second
    return x.made_of(y, lambda: d1 * x.first, _added(bent, second))


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
