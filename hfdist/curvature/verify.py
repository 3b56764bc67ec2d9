"""Checks of gradients and products against differences of losses and outputs.

An operation that autograd, or the replay of a forward pass, differentiates wrongly gives no error: it
gives another gradient or product. So on the first solve of a run, and when other operations are replayed
than before, one microbatch is also evaluated at theta + h d and theta - h d:

- the gradient along d against the central difference of losses, (L(theta + h d) - L(theta - h d)) / 2h;
- Jd against the central difference of outputs;
- d' J' H J d, whose left part is a backward pass, against (Jd)' H (Jd): J' is the adjoint of J;
- H Jd in closed form against double backward through the loss.

An embedding's `padding_idx` tells autograd to hold a row fixed: it is held fixed in these evaluations, too,
where they disagree otherwise.

A difference of losses has an error of its own, by rounding and by kinks: what it says counts if it
says the same at several h, and if the same checks fail at parameters nearby, too. At a kink, as of a
ReLU that gets nothing but zeros, a difference is between the slopes of both sides at every h.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hfdist.curvature.ggn import GGNProduct
from hfdist.curvature.layout import Product
from hfdist.curvature.linearize import Recorder
from hfdist.curvature.loss_hessian import ByDoubleBackward, ClosedForm
from hfdist.curvature.microbatch import Evaluation, Microbatch
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.reverse import grad
from hfdist.devices import is_out_of_memory
from hfdist.errors import TaskError

Gradient = Sequence[Tensor | None]
T = TypeVar("T")


class EvaluateAt(Protocol):
    """A microbatch at other parameters [P]."""

    def __call__(
        self,
        microbatch: Microbatch,
        theta: Tensor,
        then: Callable[[Evaluation], T],
        recorder: Recorder | None = None,
    ) -> T:
        """What `then` makes of the evaluation, there; the parameters are back afterwards. The recorder
        watches the forward pass."""
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


class HeldFixed(TorchFunctionMode):
    """Keeps what autograd is told to hold fixed: the first pass inside notes the values, later ones get them.

    That is the row of `padding_idx` of embeddings and, if asked for, results of `detach`. What runs without
    gradients, as the inside of custom functions does, is left alone; so is what autograd itself detaches.
    """

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self._detached = detached
        self._values: list[Tensor] = []
        self._next: int | None = None
        """Of the values, in later passes."""

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._next = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return out
        if func is Tensor.detach and self._detached:
            return self._held(out)
        if func is F.embedding:
            named = dict(zip(("input", "weight", "padding_idx"), args)) | kwargs
            padding = named.get("padding_idx")
            if padding is not None:
                row = self._held(named["weight"][padding])
                is_padding = named["input"] == padding % len(named["weight"])
                return torch.where(is_padding.unsqueeze(-1), row, out)
        return out

    def _held(self, value: Tensor) -> Tensor:
        if self._next is None:
            self._values.append(value.detach().clone())
            return value
        if self._next == len(self._values) or self._values[self._next].shape != value.shape:
            return value  # another program at other parameters
        self._next += 1
        return self._values[self._next - 1].clone()


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
    torch.float64: Tolerance(h=1e-5, difference=1e-5, rounding=1e-6),
    torch.float32: Tolerance(h=2e-3, difference=5e-2, rounding=2e-2),
}
_NEARBY = 30.0
"""How far the parameters nearby are, in h: a kink at theta is out of reach of differences there."""
_SCALES = (1.0, 0.25, 4.0)
"""Lengths at which a difference is taken, in h: the first, and the others where it disagrees."""


@dataclass(frozen=True)
class Probe:
    """Evaluations of a microbatch on a line through theta."""

    direction: list[Tensor]
    """d, shaped like the parameters."""
    here: Point
    evaluate: Callable[[float], Point]
    """t -> the values at theta + t d."""
    tolerance: Tolerance
    _known: dict[float, Point] = field(default_factory=dict)

    def at(self, t: float) -> Point:
        """The values at theta + t d; made once."""
        if t not in self._known:
            self._known[t] = self.evaluate(t)
        return self._known[t]

    def ways(self) -> Iterator[Probe]:
        """This probe, and that of the program with the padding's row of embeddings held fixed."""
        yield self
        held = self.held(detached=False)
        if held is not None:
            yield held

    def held(self, *, detached: bool) -> Probe | None:
        """This probe of the program with what it tells autograd to hold fixed held fixed (see `HeldFixed`);
        None if that cannot be done."""
        hold = HeldFixed(detached=detached)

        def evaluate(t: float) -> Point:
            with hold:
                return self.evaluate(t)

        held = dataclasses.replace(self, evaluate=evaluate, _known={})
        # Values are noted at theta. Writes into what was detached cannot be held.
        return held if float(held.at(0.0).loss) == float(self.here.loss) else None

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
        for way in probe.ways():
            if not way.contradicts(slope, e.loss_sum, lambda point: point.loss) > 0.0:
                return way
        cause = (
            f"{suspects(e)}A part of the loss has no gradient, or another one: look for no_grad, item, "
            "numpy, rounding, gradient hooks and custom autograd.Function classes"
        )
        held = probe.held(detached=True)
        if held is not None and not (
            held.contradicts(slope, e.loss_sum, lambda point: point.loss) > 0.0
        ):
            cause = (
                "They agree where what the program detaches is held fixed: autograd takes it for constant, "
                "while the losses of candidates follow it"
            )
        raise TaskError(
            f"gradient and loss disagree by {error:.1%} along a direction, so no step was taken. {cause}. "
            "If that is meant, set optim.verify=off"
        )

    def wrong_product(self, product: GGNProduct, e: Evaluation, probe: Probe) -> str | None:
        """What is wrong with a microbatch's GGN product; None if nothing was found."""
        reasons: list[str] = []
        for way in probe.ways():
            try:
                reason = self._wrong_product(product, e, way)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                return explained(error)
            if reason is None:
                return None
            reasons.append(reason)
        return reasons[0]

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
                # Where a softmax is saturated, both are differences of numbers that are nearly equal.
                noise = 100 * torch.finfo(t.dtype).eps * product.H.size * _size(known[k])
                if _size(t - reference) > tolerance.rounding * _size(reference) + noise:
                    return "the loss's Hessian in closed form is not that of double backward"
        left = _inner(d, product.pulled_back(HJd))
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
            if is_out_of_memory(error):
                raise
            raise TaskError(
                f"the Hessian's product fails: {explained(error)}. {suspects(e)}Use "
                "curvature_opt=ggn, or a forward pass that torch can differentiate twice"
            ) from error
        errors: list[float] = []
        for way in probe.ways():
            errors.append(
                way.contradicts(flat(Hd, way.direction), flat(gradient, way.direction), _gradient)
            )
            if not errors[-1] > 0.0:
                break
        else:
            raise TaskError(
                f"the Hessian's product is {errors[0]:.1%} off a difference of gradients. "
                f"{suspects(e)}Use curvature_opt=ggn, or a forward pass that torch can "
                "differentiate twice, or set optim.verify=off"
            )


def nearby(params: ParameterVector) -> Tensor:
    """Parameters [P] close by, where no number is what it is on purpose."""
    theta, h = params.read(), _TOLERANCES[params.dtype].h
    for (start, stop), t in zip(params.spans, params.tensors):
        length = max(float(t.detach().norm()) / math.sqrt(t.numel()), 1e-2)
        aside = torch.linspace(1.0, 1.0 + t.numel(), t.numel(), device=t.device).cos()
        theta[start:stop].add_(aside.to(theta.dtype), alpha=_NEARBY * h * length)
    return theta


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
            direction.append(((up + 0.5 * aside) * length).to(t.dtype))
        theta, d = params.read(), params.flatten(direction)
    return Probe(direction, here, lambda t: at_theta(theta + t * d), tolerance)


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
    "modified by an inplace operation": "an operation in place overwrites what a backward pass reads, "
    "loss.backward() fails, too: write h = h + x in place of h += x where that is",
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
