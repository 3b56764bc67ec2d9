"""Product with the Hessian of the loss in the model's outputs, H_L [M, M].

Any loss has it by a second backward pass. Losses that torch computes by cross_entropy,
binary_cross_entropy_with_logits or mse_loss have it in closed form: less time, no second graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hfdist.curvature.linearize import Program, Recorder, Unsupported
from hfdist.curvature.outputs import Edge, edge, is_reached
from hfdist.curvature.reverse import grad
from hfdist.tasks.robust import residual_loss, weights

Diagonal = Callable[[Tensor], Tensor]  # tangent of a loss function's input -> its Hessian times it


class LossHessian(Protocol):
    """v -> H_L v."""

    curved: list[int]
    """Places of the outputs in which the loss has curvature."""

    def __call__(self, v: Sequence[Tensor | None]) -> list[Tensor]:
        """Args: tangents of the outputs at `curved`, None for zero. Returns: shaped like them."""
        ...


class ByDoubleBackward:
    """H_L as the derivative of the loss's gradient.

    Args:
        inputs: The tensors that the loss was computed from.
        gradient: Of the loss in them, with a graph; None where the loss does not use one.
    """

    def __init__(self, inputs: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> None:
        # An output that the loss does not use, or uses linearly, has no curvature.
        self.curved = [k for k, dz in enumerate(gradient) if dz is not None and dz.requires_grad]
        self._inputs = [inputs[k] for k in self.curved]
        self._gradient = [gradient[k] for k in self.curved]

    def __call__(self, v: Sequence[Tensor | None]) -> list[Tensor]:
        known = [torch.zeros_like(z) if t is None else t for z, t in zip(self._inputs, v)]
        return list(
            grad(
                self._gradient,
                self._inputs,
                known,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )


@dataclass(kw_only=True)
class LossCall:
    """A call of a function whose Hessian in one argument is known."""

    input: Tensor
    """The argument."""
    diagonal: Callable[[Tensor], Diagonal]
    """Derivative of the total loss in the call's result -> product with the Hessian in `input`."""
    root: Callable[[Tensor], Diagonal]
    """The same derivative -> product with a matrix S of the Hessian's size, SS' = |the Hessian|."""
    is_loss: bool = True
    """Whether it is one of torch's losses, and its Hessian exact: the second term, the result's derivative
    times the function's, is not cut off at zero."""
    is_squares: bool = False
    """Whether the result is a positive multiple of the sum of the squares of what each number of the input
    misses its target by."""
    result: Edge = (None, 0)
    """The result, as it was when the call returned."""
    argument: Edge = (None, 0)
    """The argument, as it was then."""
    versions: tuple[tuple[Tensor, int], ...] = ()
    """Tensors that the Hessian is computed from, and their versions then."""

    def is_current(self) -> bool:
        """Whether none of them has been written into since."""
        return all(t._version == version for t, version in self.versions)


class LossWatch(TorchFunctionMode):
    """Notes the calls of known functions inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self.differentiates = False
        """Whether `torch.autograd.grad` was called."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.differentiates |= func is torch.autograd.grad
        known = KNOWN_FUNCTIONS.get(func)
        if known is None:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        cast = torch.is_autocast_enabled(out.device.type) if isinstance(out, Tensor) else False
        if cast or not isinstance(out, Tensor) or not out.requires_grad:
            return out
        call = known(out, *args, **kwargs)
        if call is not None and call.input.requires_grad and call.input.is_floating_point():
            tensors = [
                t for t in tree_leaves((list(args), kwargs, call.input)) if isinstance(t, Tensor)
            ]
            call.result, call.argument = edge(out), edge(call.input)
            call.versions = tuple((t, t._version) for t in tensors if not t.is_inference())
            self.calls.append(call)
        return out


class ClosedForm:
    """H_L = sum over calls A' D A, with D the call's Hessian and A the way from the outputs to its input.

    Args:
        inputs: The tensors that the loss was computed from.
        terms: Of each call: (A as a program, the call's input, D).
        roots: Of each call: makes S with SS' = D, see `LossCall`.
        factors: Of each call: derivative of the loss in its result.
        is_squares: Whether each call is a multiple of a sum of squares.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        terms: Sequence[tuple[Program | None, Tensor, Diagonal]],
        roots: Sequence[Callable[[], Diagonal]] = (),
        factors: Sequence[Tensor] = (),
        is_squares: bool = False,
    ) -> None:
        self.curved = list(range(len(inputs)))
        self._inputs, self._terms, self._roots = list(inputs), list(terms), list(roots)
        self._factors = list(factors)
        self._has_squares = is_squares
        self.needs_graph = any(program is not None for program, _, _ in terms)

    def __call__(self, v: Sequence[Tensor | None]) -> list[Tensor]:
        totals: list[Tensor | None] = [None] * len(self._inputs)

        def add(k: int, t: Tensor | None) -> None:
            if t is not None:
                totals[k] = t if totals[k] is None else totals[k] + t  # type: ignore[operator]

        known: list[Tensor] | None = None
        with torch.no_grad():
            for program, x, diagonal in self._terms:
                if program is None:  # the call's input is an output itself
                    k = next(k for k, z in enumerate(self._inputs) if z is x)
                    t = v[k]
                    add(k, None if t is None else diagonal(t))
                    continue
                known = known or [
                    torch.zeros_like(z) if t is None else t for z, t in zip(self._inputs, v)
                ]
                (tx,) = program(known)
                if tx is not None:
                    back = grad(x, self._inputs, diagonal(tx), retain_graph=True, allow_unused=True)
                    for k, t in enumerate(back):
                        add(k, t)
        return [torch.zeros_like(z) if t is None else t for z, t in zip(self._inputs, totals)]

    @property
    def is_squares(self) -> bool:
        """Whether the loss is a sum of squares, none with a minus."""
        return self._has_squares and all(bool((f >= 0).all()) for f in self._factors)

    @property
    def size(self) -> float:
        """sum of |dL/d(result)|: of what size the entries of D are where nothing cancels in them."""
        return sum(float(factor.abs().sum()) for factor in self._factors)

    def root(self, draw: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        """sum over calls A' S u, so that its mean outer product is H_L; None stands for zero.

        Args:
            draw: A call's input -> u of its shape, E[uu'] = I, independent between calls.
        """
        totals: list[Tensor | None] = [None] * len(self._inputs)
        with torch.no_grad():
            for (program, x, _), root in zip(self._terms, self._roots, strict=True):
                s = root()(draw(x))
                if program is None:
                    found: Sequence[Tensor | None] = [s if z is x else None for z in self._inputs]
                else:
                    found = grad(x, self._inputs, s, retain_graph=True, allow_unused=True)
                totals = [
                    b if a is None else a if b is None else a + b for a, b in zip(totals, found)
                ]
        return totals


def closed_form(
    loss: Tensor, inputs: Sequence[Tensor], calls: Sequence[LossCall], recorder: Recorder | None
) -> ClosedForm | None:
    """H_L of a loss that is linear in known calls, which see the outputs through nothing but views.

    Args:
        loss: Scalar, with a graph to `inputs`.
        inputs: Leaves.
        calls: What a `LossWatch` noted while the loss was computed.
        recorder: Followed `inputs` through the same computation.

    Returns:
        None if the loss is another one.
    """
    calls = [call for call in calls if call.is_loss]
    if not calls or recorder is None or not all(call.is_current() for call in calls):
        return None
    # The results as they were returned: arithmetic in place may have followed.
    results = [call.result for call in calls]
    if is_reached(loss, inputs, without=results):
        return None  # something else depends on the outputs too
    factors = derivatives_in(loss, results)
    terms: list[tuple[Program | None, Tensor, Diagonal]] = []
    roots: list[Callable[[], Diagonal]] = []
    used: list[Tensor] = []
    is_squares = True
    for call, factor in zip(calls, factors):
        if factor is None:
            continue
        if factor.requires_grad:
            return None  # a nonlinear function of the call's value
        program: Program | None = None
        if not any(call.input is z for z in inputs):
            try:
                program = recorder.program([call.input])
            except Unsupported:
                return None
        terms.append((program, call.input, call.diagonal(factor.detach())))
        roots.append(partial(call.root, factor.detach()))
        used.append(factor.detach())
        is_squares = is_squares and call.is_squares
    return ClosedForm(inputs, terms, roots, used, is_squares)


def derivatives_in(loss: Tensor, results: Sequence[Edge]) -> Sequence[Tensor | None]:
    """dL/d(result), with a graph; None where the loss does not use it."""
    return grad(
        loss,
        [GradientEdge(*result) for result in results],
        create_graph=True,
        retain_graph=True,
        allow_unused=True,
    )


# -- the known losses ------------------------------------------------------------------------------


def _cross_entropy(
    out: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossCall | None:
    """Of one row x with p = softmax(x): s (diag(p) - pp'), s the weight of its target."""
    if size_average is not None or reduce is not None or input.ndim < 1:
        return None
    if _needs_gradient(target, weight):
        return None
    axis = 0 if input.ndim == 1 else 1
    classes = input.shape[axis]

    def parts(factor: Tensor) -> tuple[Tensor, Any]:
        """(p, s / count)."""
        x = input.detach()
        p = torch.softmax(x, axis)
        ones = torch.ones(classes, dtype=x.dtype, device=x.device) if weight is None else weight
        if target.shape == input.shape and target.is_floating_point():
            y = target.detach()
            if label_smoothing > 0:
                y = (1 - label_smoothing) * y + label_smoothing / classes
            shape = [1] * x.ndim
            shape[axis] = classes
            s = (ones.view(shape) * y).sum(axis)
            count: Tensor | float = float(max(1, s.numel()))
        else:
            counted = target != ignore_index
            own = torch.where(
                counted, ones[target.clamp(0, classes - 1)], torch.zeros((), dtype=x.dtype)
            )
            s = own
            if label_smoothing > 0:
                uniform = ones.sum() * (label_smoothing / classes)
                s = (1 - label_smoothing) * own + uniform * counted
            count = own.sum()
        s = s * factor / (count if reduction == "mean" else 1.0)
        s = s.unsqueeze(axis)
        # A number is a cheaper factor, but the host would have to wait for a device to know it.
        is_known = s.device.type == "cpu" and s.numel() > 0
        if is_known and bool((s == s.reshape(-1)[0]).all()):
            return p, float(s.reshape(-1)[0])
        return p, s

    def diagonal(factor: Tensor) -> Diagonal:
        p, scale = parts(factor)

        def D(t: Tensor) -> Tensor:
            return torch.ops.aten._softmax_backward_data(t, p, axis, p.dtype).mul_(scale)

        return D

    def root(factor: Tensor) -> Diagonal:
        p, scale = parts(factor)
        return _softmax_root(p, torch.as_tensor(scale, dtype=p.dtype, device=p.device), axis)

    return LossCall(input=input, diagonal=diagonal, root=root)


def _bce_with_logits(
    out: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossCall | None:
    """Element by element: weight (1 + (pos_weight - 1) y) p (1 - p)."""
    if size_average is not None or reduce is not None:
        return None
    if _needs_gradient(target, weight, pos_weight):
        return None

    def elements(factor: Tensor) -> Tensor:
        p = torch.sigmoid(input.detach())
        d = p * (1 - p)
        if pos_weight is not None:
            d = d * (1 + (pos_weight - 1) * target)
        if weight is not None:
            d = d * weight
        return d * (factor / (d.numel() if reduction == "mean" else 1))

    return _element_wise(input, elements)


def _mse(
    out: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossCall | None:
    """Element by element: 2 weight."""
    if (
        size_average is not None
        or reduce is not None
        or target.shape != input.shape
        or weight is not None
    ):
        return None

    def elements(factor: Tensor) -> Tensor:
        return 2.0 * factor / (input.numel() if reduction == "mean" else 1)

    if target.requires_grad:  # then the loss is a function of the difference
        return _element_wise(input - target, elements, is_loss=False)
    call = _element_wise(input, elements)
    call.is_squares = True
    return call


def _element_wise(
    input: Tensor, elements: Callable[[Tensor], Tensor], *, is_loss: bool = True
) -> LossCall:
    """A function whose Hessian is diagonal: `elements` gives the diagonal, or one number for all of it."""

    def diagonal(factor: Tensor) -> Diagonal:
        d = elements(factor)
        return lambda t: t * d

    def root(factor: Tensor) -> Diagonal:
        d = elements(factor).abs().sqrt()
        return lambda t: t * d

    return LossCall(input=input, diagonal=diagonal, root=root, is_loss=is_loss)


def _softmax_root(p: Tensor, scale: Tensor, axis: int) -> Diagonal:
    """S = |scale|^1/2 (diag(q) - pq') with q = p^1/2: SS' = |scale| (diag(p) - pp'), as q'q = 1."""
    q, size = p.sqrt(), scale.abs().sqrt()
    return lambda u: size * (q * u - p * (q * u).sum(axis, keepdim=True))


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


# -- other functions with curvature ------------------------------------------------------------------


def _by_second_derivative(second: Callable[[Tensor], Tensor]) -> Callable[..., LossCall]:
    """A function element by element."""

    def known(out: Tensor, input: Tensor, *_: Any, **__: Any) -> LossCall:
        def elements(factor: Tensor) -> Tensor:
            return (second(input.detach()) * factor).clamp(min=0.0)

        return _element_wise(input, elements, is_loss=False)

    return known


def _pow(out: Tensor, input: Any, exponent: Any, *_: Any, **__: Any) -> LossCall | None:
    if not isinstance(input, Tensor) or not isinstance(exponent, (int, float)):
        return None
    n = float(exponent)
    return _by_second_derivative(lambda x: n * (n - 1.0) * (x ** (n - 2.0)))(out, input)


def _product(out: Tensor, input: Any, other: Any, **_: Any) -> LossCall | None:
    """x * x."""
    return (
        _by_second_derivative(lambda x: torch.full_like(x, 2.0))(out, input)
        if input is other
        else None
    )


def _norm(
    out: Tensor,
    input: Tensor,
    order: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    p: Any = None,
    ord: Any = None,
    dtype: Any = None,
    **_: Any,
) -> LossCall | None:
    """Euclidean norms: (I - nn') / |x|, n = x / |x|."""
    order = next((o for o in (order, p, ord) if o is not None), "fro")
    if order not in (2, 2.0, "fro") or dtype is not None or (dim is None and keepdim):
        return None

    def parts(factor: Tensor) -> tuple[Tensor, Tensor]:
        """(n, factor / |x|)."""
        x = input.detach()
        size = out.detach()
        scale = factor.clamp(min=0.0)
        if dim is not None and not keepdim:
            axes = [dim] if isinstance(dim, int) else list(dim)
            for axis in sorted(a % x.ndim for a in axes):
                size, scale = size.unsqueeze(axis), scale.unsqueeze(axis)
        n = torch.where(size > 0, x / size, 0.0)
        return n, torch.where(size > 0, scale / size, 0.0)

    def across(n: Tensor, t: Tensor) -> Tensor:
        """(I - nn') t; a projection, which is its own root."""
        along = (n * t).sum(dim, keepdim=True) if dim is not None else (n * t).sum()
        return t - n * along

    def diagonal(factor: Tensor) -> Diagonal:
        n, scale = parts(factor)
        return lambda t: scale * across(n, t)

    def root(factor: Tensor) -> Diagonal:
        n, scale = parts(factor)
        return lambda t: scale.sqrt() * across(n, t)

    return LossCall(input=input, diagonal=diagonal, root=root, is_loss=False)


def _linalg_norm(
    out: Tensor, A: Tensor, ord: Any = None, dim: Any = None, **rest: Any
) -> LossCall | None:
    """`torch.linalg.norm`, whose order 2 of a matrix is the largest singular value."""
    is_vector = A.ndim == 1 or isinstance(dim, int)
    return _norm(out, A, ord, dim, **rest) if is_vector or ord in (None, "fro") else None


def _log_softmax(
    out: Tensor, input: Tensor, dim: Any = None, *_: Any, **__: Any
) -> LossCall | None:
    """Minus (sum of the factors) times (diag(p) - pp')."""
    if not isinstance(dim, int):
        return None

    def diagonal(factor: Tensor) -> Diagonal:
        p = torch.softmax(input.detach(), dim)
        weight = (-factor.sum(dim, keepdim=True)).clamp(min=0.0)
        return lambda t: weight * p * (t - (p * t).sum(dim, keepdim=True))

    def root(factor: Tensor) -> Diagonal:
        weight = (-factor.sum(dim, keepdim=True)).clamp(min=0.0)
        return _softmax_root(torch.softmax(input.detach(), dim), weight, dim)

    return LossCall(input=input, diagonal=diagonal, root=root, is_loss=False)


def _logistic(x: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    return p * (1.0 - p)


def _residual_loss(
    out: Tensor, residuals: Tensor, loss: str = "squares", scale: float = 1.0
) -> LossCall:
    """The weights of iteratively reweighted least squares, see `hfdist.tasks.robust`."""
    return _element_wise(
        residuals, lambda factor: weights(residuals.detach(), loss, scale) * factor
    )


KNOWN_FUNCTIONS: dict[Any, Callable[..., LossCall | None]] = {
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy_with_logits: _bce_with_logits,
    F.mse_loss: _mse,
    residual_loss: _residual_loss,
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _pow),
    **dict.fromkeys(
        (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__), _product
    ),
    **dict.fromkeys((torch.dot, Tensor.dot, torch.inner, torch.vdot), _product),
    **dict.fromkeys(
        (torch.square, Tensor.square), _by_second_derivative(lambda x: torch.full_like(x, 2.0))
    ),
    **dict.fromkeys((torch.exp, Tensor.exp), _by_second_derivative(torch.exp)),
    **dict.fromkeys((torch.log, Tensor.log), _by_second_derivative(lambda x: -1.0 / x.square())),
    **dict.fromkeys(
        (torch.reciprocal, Tensor.reciprocal), _by_second_derivative(lambda x: 2.0 / x**3)
    ),
    **dict.fromkeys((F.softplus,), _by_second_derivative(_logistic)),
    **dict.fromkeys((F.logsigmoid,), _by_second_derivative(lambda x: -_logistic(x))),
    **dict.fromkeys((torch.norm, Tensor.norm, torch.linalg.vector_norm), _norm),
    torch.linalg.norm: _linalg_norm,
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
}
"""Functions whose Hessian in their argument is known; of those that are no losses, the part that is positive
semi-definite."""
