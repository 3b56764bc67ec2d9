"""Checks of gradients and products against differences of losses and outputs.

An operation that autograd, or the replay of a forward pass, differentiates wrongly gives no error: it
gives another gradient or product. So on the first solve of a run, and when other operations are replayed
than before, one microbatch is also evaluated at theta + h d and theta - h d:

- the gradient along d against the central difference of losses, (L(theta + h d) - L(theta - h d)) / 2h;
- Jd against the central difference of outputs;
- d' J' H J d, whose left part is a backward pass, against (Jd)' H (Jd): J' is the adjoint of J;
- H Jd in closed form against double backward through the loss.

A difference of losses has an error of its own, by rounding and by kinks: what it says counts if it
says the same at several h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import grad

from hfdist.curvature.ggn import GGNProduct
from hfdist.curvature.layout import Product
from hfdist.curvature.loss_hessian import ByDoubleBackward, ClosedForm
from hfdist.curvature.microbatch import Evaluation, Microbatch
from hfdist.curvature.params import ParameterVector
from hfdist.errors import TaskError

Gradient = Sequence[Tensor | None]
T = TypeVar("T")


class EvaluateAt(Protocol):
    """A microbatch at other parameters [P]."""

    def __call__(self, microbatch: Microbatch, theta: Tensor, then: Callable[[Evaluation], T]) -> T:
        """What `then` makes of the evaluation; the parameters are back afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class Point:
    """Values of a microbatch at some parameters, without a graph."""

    loss: Tensor
    outputs: Sequence[Tensor]
    gradient: Tensor | None = None
    """[P]."""

    @classmethod
    def of(cls, e: Evaluation) -> Point:
        return cls(loss=e.loss_sum.detach(), outputs=[z.detach() for z in e.outputs])


_MOST_CHECKS = 4
"""Of a run: a program that is never the same twice is not checked for ever."""


@dataclass(frozen=True)
class Tolerance:
    """What follows from a dtype."""

    h: float
    """Relative length of a difference."""
    difference: float
    """Relative error of a difference that is not its own."""
    rounding: float
    """Relative error of what is the same in exact arithmetic."""


_TOLERANCES = {
    torch.float64: Tolerance(h=1e-5, difference=1e-3, rounding=1e-6),
    torch.float32: Tolerance(h=2e-3, difference=5e-2, rounding=2e-2),
}
_SCALES = (1.0, 0.25, 4.0)
"""Lengths at which a difference is taken, in h: the first, and the others where it disagrees."""


@dataclass(frozen=True)
class Probe:
    """Evaluations of a microbatch on a line through theta."""

    direction: list[Tensor]
    """d, shaped like the parameters."""
    here: Point
    at: Callable[[float], Point]
    """t -> the values at theta + t d; made once."""
    tolerance: Tolerance

    @property
    def is_repeatable(self) -> bool:
        """Whether a second evaluation at theta gives the same loss."""
        here, again = float(self.here.loss), float(self.at(0.0).loss)
        return math.isclose(here, again, rel_tol=1e3 * torch.finfo(self.here.loss.dtype).eps)

    def contradicts(self, claimed: Tensor, here: Tensor, value: Callable[[Point], Tensor]) -> float:
        """How far a claimed derivative along d is from central differences, relatively: 0 where it is not,
        NaN where they cannot tell.

        Args:
            claimed: The derivative of `value`.
            here: Its value at theta.
            value: Scalar or tensor of a point.
        """
        claimed, here = claimed.detach(), here.detach()
        rounding = 20 * torch.finfo(here.dtype).eps * _size(here)
        found: list[Tensor] = []
        for scale in _SCALES:
            h = scale * self.tolerance.h
            plus, minus = (value(self.at(t)) for t in (h, -h))
            if not plus.shape == minus.shape == claimed.shape:
                return math.nan  # other numbers of outputs at other parameters
            difference = (plus - minus) / (2 * h)
            error = _size(difference - claimed)
            if math.isfinite(_size(difference)) and not math.isfinite(_size(claimed)):
                return math.inf
            allowed = self.tolerance.difference * max(_size(difference), _size(claimed))
            if not error > allowed + rounding / h:  # also where something is not finite
                return math.nan if found or not math.isfinite(error) else 0.0
            found.append(difference)
        spread = max(_size(difference - found[0]) for difference in found)
        error = _size(found[0] - claimed)
        if spread > 0.5 * error:
            return math.nan
        return error / max(_size(found[0]), _size(claimed))


@dataclass(kw_only=True)
class Verifier:
    """When to check, and what was found.

    Args:
        mode: "first": on the first solve, and when what is replayed changes; "always": on every solve;
            "off".
    """

    mode: Literal["first", "always", "off"] = "first"
    refused: set[str] = field(default_factory=set)
    """Engines that were wrong."""
    _seen: set[str] = field(default_factory=set)
    _num_checks: int = 0

    @property
    def is_on(self) -> bool:
        return self.mode == "always" or (self.mode == "first" and self._num_checks < _MOST_CHECKS)

    def wants(self, operations: Sequence[str]) -> bool:
        """Whether a product by these operations is to be checked."""
        return self.mode == "always" or (self.is_on and not self._seen.issuperset(operations))

    def done(self, operations: Sequence[str]) -> None:
        """They were checked."""
        self._seen.update(operations)
        self._num_checks += 1

    def check_gradient(
        self,
        params: ParameterVector,
        e: Evaluation,
        gradient: Gradient,
        at: Callable[[Tensor], Point],
    ) -> Probe | None:
        """Compare the gradient of a microbatch with differences of its loss.

        Returns:
            For further checks; None where there is nothing to tell by.

        Raises:
            TaskError: They disagree.
        """
        tolerance = _TOLERANCES.get(params.dtype)
        if tolerance is None or not math.isfinite(float(e.loss_sum.detach())):
            return None
        probe = _probe(params, Point.of(e), gradient, at, tolerance)
        slope = sum(
            (
                torch.dot(g.detach().reshape(-1).double(), d.reshape(-1).double())
                for g, d in zip(gradient, probe.direction)
                if g is not None
            ),
            start=torch.zeros((), dtype=torch.float64, device=params.device),
        )
        error = probe.contradicts(slope, e.loss_sum, lambda point: point.loss)
        if error != 0.0 and not probe.is_repeatable:
            raise TaskError(
                f"two evaluations of the same loss differ ({float(probe.here.loss):.9g} and "
                f"{float(probe.at(0.0).loss):.9g}): the forward pass draws new data or keeps state "
                "between calls. Give it the same data until the step is done, or set optim.verify=off"
            )
        if not error > 0.0:
            return probe
        raise TaskError(
            f"gradient and loss disagree by {error:.1%} along a direction, so no step was taken. "
            f"{suspects(e)}A part of the loss has no gradient, or another one: look for detach, "
            "no_grad, item, numpy, rounding, gradient hooks and custom autograd.Function classes. If "
            "that is meant, set optim.verify=off"
        )

    def wrong_product(self, product: GGNProduct, e: Evaluation, probe: Probe) -> str | None:
        """What is wrong with a microbatch's GGN product; None if nothing was found."""
        try:
            return self._wrong_product(product, e, probe)
        except RuntimeError as error:
            return explained(error)

    @staticmethod
    def _wrong_product(product: GGNProduct, e: Evaluation, probe: Probe) -> str | None:
        d, tolerance, curved = probe.direction, probe.tolerance, product.H.curved
        Jd = product.J(d)
        known = [torch.zeros_like(e.outputs[k]) if t is None else t for k, t in zip(curved, Jd)]
        for k, t in zip(curved, known):
            error_J = probe.contradicts(t, e.outputs[k], _output(k))
            if error_J > 0.0:
                return f"the derivative of output {k} is {error_J:.1%} off a difference of outputs"
        if not known:
            return None
        HJd = product.H(known)
        if isinstance(product.H, ClosedForm):
            dz = grad(
                e.loss_sum, e.loss_inputs, create_graph=True, retain_graph=True, allow_unused=True
            )
            by_graph = ByDoubleBackward(e.loss_inputs, dz)
            other = dict(zip(by_graph.curved, by_graph([known[k] for k in by_graph.curved])))
            for k, t in enumerate(HJd):
                reference = other.get(k, torch.zeros_like(t))
                if float((t - reference).norm()) > tolerance.rounding * float(reference.norm()):
                    return "the loss's Hessian in closed form is not that of double backward"
        Gd = product(d)
        left = _inner(d, Gd)
        right = _inner(known, HJd)
        size = math.sqrt(_inner(known, known) * _inner(HJd, HJd))
        if abs(left - right) > tolerance.rounding * size:
            return "the backward pass is not the adjoint of the forward pass's derivative"
        return None

    def check_hessian(
        self,
        product: Product,
        e: Evaluation,
        gradient: Gradient,
        probe: Probe,
    ) -> None:
        """Compare a Hessian product along the probe with a difference of gradients.

        Raises:
            TaskError: They disagree.
        """
        try:
            Hd = product(probe.direction)
        except RuntimeError as error:
            raise TaskError(
                f"the Hessian's product fails: {explained(error)}. {suspects(e)}Use "
                "curvature_opt=ggn, or a forward pass that torch can differentiate twice"
            ) from error
        error_H = probe.contradicts(
            flat(Hd, probe.direction), flat(gradient, probe.direction), _gradient
        )
        if error_H > 0.0:
            raise TaskError(
                f"the Hessian's product is {error_H:.1%} off a difference of gradients. "
                f"{suspects(e)}Use curvature_opt=ggn, or a forward pass that torch can "
                "differentiate twice, or set optim.verify=off"
            )


def _probe(
    params: ParameterVector,
    here: Point,
    gradient: Gradient,
    at_theta: Callable[[Tensor], Point],
    tolerance: Tolerance,
) -> Probe:
    """A line along which every parameter tensor moves in proportion to its size, up its own gradient and a
    little aside; one without a gradient only aside."""
    direction = []
    with torch.no_grad():
        for t, g in zip(params.tensors, gradient):
            aside = torch.linspace(0.5, t.numel() + 0.5, t.numel(), device=t.device).sin()
            aside = (aside / aside.norm().clamp_min(1e-12)).view(t.shape).to(t.dtype)
            length = max(float(t.detach().norm()), 1e-2 * math.sqrt(t.numel()))
            size = 0.0 if g is None else float(g.norm())
            up: Tensor | float = 0.0
            if g is not None and 0.0 < size < math.inf:
                up = g / size
                # An entry without a gradient may be one on purpose: an embedding's padding.
                aside = aside * (g != 0)
            direction.append(((up + 0.5 * aside) * length).to(t.dtype))
        theta, d = params.read(), params.flatten(direction)
    known: dict[float, Point] = {}

    def at(t: float) -> Point:
        if t not in known:
            known[t] = at_theta(theta + t * d)
        return known[t]

    return Probe(direction, here, at, tolerance)


def _output(k: int) -> Callable[[Point], Tensor]:
    return lambda point: point.outputs[k]


def _gradient(point: Point) -> Tensor:
    assert point.gradient is not None
    return point.gradient


def _size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.reshape(-1).to(_wide(x.dtype))))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def suspects(e: Evaluation) -> str:
    """A sentence that names the custom autograd functions in an evaluation's graph; empty without any."""
    names: set[str] = set()
    waiting, seen = [t.grad_fn for t in (e.loss_sum, *e.outputs)], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            names.add(type(node).__name__.removesuffix("Backward"))
        waiting += [n for n, _ in node.next_functions]
    if not names:
        return ""
    return f"Its graph has custom autograd functions: {', '.join(sorted(names))}. "


_FIXES = {
    "_embedding_bag": "use nn.Embedding and a sum or mean over its result in place of nn.EmbeddingBag",
    "_ctc_loss": "torch's CTC loss has no second derivative: write the forward algorithm in torch operations "
    "(logsumexp over a loop), or use another loss",
    "once_differentiable": "give the custom autograd.Function a backward() that torch can differentiate",
    "scaled_dot_product": "use attention that torch computes by matrix products (Hugging Face: "
    'attn_implementation="eager")',
    "cudnn": "set torch.backends.cudnn.enabled = False around the recurrent layer",
    "sparse": "use nn.Embedding(sparse=False)",
}
"""What an error of autograd contains, and what to do about it."""


def explained(error: Exception) -> str:
    """Autograd's error in one sentence, with the fix where it is known."""
    said = str(error).strip().partition("\n")[0].rstrip(".")
    fix = next((fix for sign, fix in _FIXES.items() if sign in said), None)
    return said if fix is None else f"{said} ({fix})"


def _inner(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    return float(
        sum(
            (x.conj() * y).real.double().sum() if x.is_complex() else (x * y).double().sum()
            for x, y in zip(a, b)
            if x is not None and y is not None
        )
    )


def flat(tensors: Gradient, like: Sequence[Tensor]) -> Tensor:
    """[P]; None stands for zero."""
    return torch.cat(
        [
            (torch.zeros_like(p) if t is None else t).detach().reshape(-1)
            for t, p in zip(tensors, like)
        ]
    )
