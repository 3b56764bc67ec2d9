"""Product with the Hessian of the loss in the model's outputs, H_L [M, M].

Any loss has it by a second backward pass. Losses that torch computes by cross_entropy,
binary_cross_entropy_with_logits or mse_loss have it in closed form: less time, no second graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hfdist.curvature.linearize import Program, Recorder, Unsupported
from hfdist.curvature.outputs import is_reached

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
                self._gradient,  # type: ignore[arg-type]
                self._inputs,
                known,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )


@dataclass(kw_only=True)
class LossCall:
    """A call of a loss function that is known in closed form."""

    input: Tensor
    output: Tensor
    diagonal: Callable[[Tensor], Diagonal]
    """Factor of the call's output in the total loss -> product with the Hessian in `input`."""


class LossWatch(TorchFunctionMode):
    """Notes the calls of known loss functions inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known = _KNOWN.get(func)
        cast = torch.is_autocast_enabled(out.device.type) if isinstance(out, Tensor) else False
        if known is not None and not cast and isinstance(out, Tensor) and out.requires_grad:
            call = known(out, *args, **kwargs)
            if call is not None:
                self.calls.append(call)
        return out


class ClosedForm:
    """H_L = sum over calls A' D A, with D the call's Hessian and A the way from the outputs to its input.

    Args:
        inputs: The tensors that the loss was computed from.
        terms: Of each call: (A as a program, the call's input, D).
    """

    def __init__(
        self, inputs: Sequence[Tensor], terms: Sequence[tuple[Program | None, Tensor, Diagonal]]
    ) -> None:
        self.curved = list(range(len(inputs)))
        self._inputs, self._terms = list(inputs), list(terms)
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
    if not calls or recorder is None:
        return None
    outs = [call.output for call in calls]
    if is_reached(loss, inputs, without=outs):
        return None  # something else depends on the outputs too
    factors = grad(loss, outs, create_graph=True, retain_graph=True, allow_unused=True)
    terms: list[tuple[Program | None, Tensor, Diagonal]] = []
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
    return ClosedForm(inputs, terms)


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
    axis = 0 if input.ndim == 1 else 1
    classes = input.shape[axis]

    def diagonal(factor: Tensor) -> Diagonal:
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
        uniform_weight = s.numel() > 0 and bool((s == s.reshape(-1)[0]).all())
        scale: Any = float(s.reshape(-1)[0]) if uniform_weight else s

        def D(t: Tensor) -> Tensor:
            return torch.ops.aten._softmax_backward_data(t, p, axis, p.dtype).mul_(scale)

        return D

    return LossCall(input=input, output=out, diagonal=diagonal)


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
    if size_average is not None or reduce is not None or target.requires_grad:
        return None

    def diagonal(factor: Tensor) -> Diagonal:
        p = torch.sigmoid(input.detach())
        d = p * (1 - p)
        if pos_weight is not None:
            d = d * (1 + (pos_weight - 1) * target)
        return _element_wise(d, weight, factor, reduction)

    return LossCall(input=input, output=out, diagonal=diagonal)


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
        or target.requires_grad
        or target.shape != input.shape
        or weight is not None
    ):
        return None

    def diagonal(factor: Tensor) -> Diagonal:
        scale = 2.0 * factor / (input.numel() if reduction == "mean" else 1)
        return lambda t: t * scale

    return LossCall(input=input, output=out, diagonal=diagonal)


def _element_wise(d: Tensor, weight: Tensor | None, factor: Tensor, reduction: str) -> Diagonal:
    if weight is not None:
        d = d * weight
    d = d * (factor / (d.numel() if reduction == "mean" else 1))
    return lambda t: t * d


_KNOWN: dict[Any, Callable[..., LossCall | None]] = {
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy_with_logits: _bce_with_logits,
    F.mse_loss: _mse,
}
