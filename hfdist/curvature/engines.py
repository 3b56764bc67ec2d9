"""How curvature products are computed: a choice that changes time and memory, not the result."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from hfdist.comm import Communicator
from hfdist.curvature.captured import CapturedProduct
from hfdist.curvature.direct import direct_product, hessian_of_arguments
from hfdist.curvature.ggn import GGNProduct, SumOfProducts, added
from hfdist.curvature.hessian import HessianProduct
from hfdist.curvature.jacobian_rows import RowMethod
from hfdist.curvature.layout import Product
from hfdist.curvature.linearize import Jacobian, Recorder, Unsupported
from hfdist.curvature.loss_hessian import ByDoubleBackward, LossHessian
from hfdist.curvature.memory import MemoryCounter, memory_left
from hfdist.curvature.microbatch import Evaluation, LossTraits, Microbatch, TryAgain
from hfdist.curvature.outputs import are_nested, is_reached
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.reverse import grad
from hfdist.curvature.verify import EvaluateAt, Point, Verifier, explained, flat, nearby, suspects
from hfdist.devices import is_accelerator, is_out_of_memory, to_be_captured
from hfdist.errors import TaskError
from hfdist.optim.options import HFOptions

logger = logging.getLogger(__name__)

T = TypeVar("T")
Gradient = Sequence[Tensor | None]
Evaluate = Callable[[Microbatch, Recorder | None], Evaluation]
LINEARIZE, DOUBLE_BACKWARD, RECOMPUTE = "linearize", "double_backward", "recompute"


def autocast_dtype(options: HFOptions) -> torch.dtype | None:
    """What `product_autocast` asks for."""
    return torch.bfloat16 if options.product_autocast == "bfloat16" else None


@dataclass(kw_only=True)
class ProductEngine:
    """The engine of a run; it lives as long as the run does.

    Attributes:
        requested: "linearize" replays the forward pass on tangents, "double_backward" differentiates
            the backward pass, "recompute" keeps nothing between products. A forward pass that cannot be
            replayed has double backward anyway.
        memory_budget: Bytes for graphs that are kept between products; microbatches beyond it are
            recomputed for each. None: what the device has left.
        reserved: Bytes of the device that the rest of the step needs (see `memory.reserved_bytes`).
        captures: Products that are replayed become graphs of the device's kernels, where it has them.
        verifier: Checks gradients and products against differences of losses and outputs.
        traits: What was found out about the loss.
        rows: How rows of the Jacobian of residuals are computed.
        used: What the last microbatch had, where that is not what was asked for.
    """

    requested: str = LINEARIZE
    memory_budget: int | None = None
    reserved: int = 0
    captures: bool = False
    verifier: Verifier = field(default_factory=Verifier)
    traits: LossTraits = field(default_factory=LossTraits)
    rows: RowMethod = field(default_factory=RowMethod)
    used: str | None = None
    _warned: set[str] = field(default_factory=set)

    @property
    def reported(self) -> str:
        """What products were computed by."""
        return self.used or self.requested

    def warn(self, message: str) -> None:
        """Once a run."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


class ProductBuilder:
    """Turns the microbatches of a role into gradients and products.

    Args:
        engine: The run's engine.
        params: The parameters.
        comm: The ranks.
        curvature: "ggn" or "hessian".
        evaluate: A forward pass with graph.
        evaluate_at: The same at other parameters [P], for checks; None: nothing is checked.
        num_microbatches: How many there will be.
    """

    def __init__(
        self,
        engine: ProductEngine,
        params: ParameterVector,
        comm: Communicator,
        curvature: Literal["ggn", "hessian"],
        evaluate: Evaluate,
        evaluate_at: EvaluateAt | None,
        num_microbatches: int,
    ) -> None:
        self.products: list[Product] = []
        self._engine, self._params = engine, params
        self._tensors = params.tensors
        self._is_ggn = curvature == "ggn"
        self._evaluate, self._evaluate_at = evaluate, evaluate_at
        self._budget = math.inf
        self._graphs_at_once = 1
        self._counter: MemoryCounter | None = None
        if engine.memory_budget is not None:
            self._budget = engine.memory_budget
        elif num_microbatches > 1:
            self._budget = memory_left(params.device, comm.world_size, engine.reserved)
            # An accelerator's memory ends where it ends: room for the graph that is recomputed, too.
            self._graphs_at_once = 2 if is_accelerator(params.device) else 1

    def add(self, microbatch: Microbatch) -> tuple[Evaluation, Gradient]:
        """Evaluate a microbatch, append its product.

        Returns:
            The evaluation and the gradient of its loss sum.

        Raises:
            TaskError: Loss and gradient disagree, or no engine has right products.
        """
        if self._engine.captures:
            with to_be_captured(self._params.device):
                return self._add(microbatch)
        return self._add(microbatch)

    def _add(self, microbatch: Microbatch) -> tuple[Evaluation, Gradient]:
        if self._budget <= 0 or self._engine.requested == RECOMPUTE:
            return self._without_graph(microbatch)
        replays = self._is_ggn and self._engine.requested == LINEARIZE
        counter = self._counter = MemoryCounter() if self._budget < math.inf else None
        with counter or nullcontext():
            e, recorder = self._evaluated(microbatch, replays)
            is_full = (
                counter is not None and self._graphs_at_once * counter.num_bytes > self._budget
            )
            if is_full and not self._may_check:
                self._budget = 0  # and all that follow
                self.products.append(self._recomputed(microbatch))
                return e, loss_gradient(e, self._tensors)
            with _explained():
                gradient, product = self._kept(microbatch, e, recorder)
        if counter is not None:
            self._budget = 0 if is_full else self._budget - counter.num_bytes
        self.products.append(self._recomputed(microbatch) if is_full else product)
        return e, gradient

    def _evaluated(
        self, microbatch: Microbatch, replays: bool
    ) -> tuple[Evaluation, Recorder | None]:
        """A forward pass, again where the first one found out something about the loss."""
        while True:
            recorder = Recorder(self._tensors) if replays else None
            try:
                return self._evaluate(microbatch, recorder), recorder
            except TryAgain:
                continue

    def _without_graph(self, microbatch: Microbatch) -> tuple[Evaluation, Gradient]:
        if self._may_check:
            # What every product will do, once and for inspection.
            e, recorder = self._evaluated(microbatch, replays=self._is_ggn)
            with _explained():
                gradient, _ = self._kept(microbatch, e, recorder)
            self._engine.used = None
        else:
            e, _ = self._evaluated(microbatch, replays=False)
            gradient = loss_gradient(e, self._tensors)
        self.products.append(self._recomputed(microbatch))
        return e, gradient

    def _recomputed(self, microbatch: Microbatch) -> Product:
        replays = self._is_ggn and LINEARIZE not in self._engine.verifier.refused
        kind = RecomputedGGNProduct if self._is_ggn else RecomputedHessianProduct
        return kind(lambda: self._evaluated(microbatch, replays), self._tensors)

    def _evaluated_at(
        self,
        microbatch: Microbatch,
        theta: Tensor,
        then: Callable[[Evaluation], T],
        recorder: Recorder | None = None,
    ) -> T:
        """For checks: see `EvaluateAt`."""
        assert self._evaluate_at is not None
        counted = 0 if self._counter is None else self._counter.num_bytes
        found = self._evaluate_at(microbatch, theta, then, recorder)
        if self._counter is not None:
            self._counter.num_bytes = counted  # it is let go of
        return found

    def _point_at(self, microbatch: Microbatch) -> Callable[[Tensor], Point]:
        @torch.no_grad()  # what is computed here is none of the program's
        def point(e: Evaluation) -> Point:
            point = Point.of(e)
            if self._is_ggn:
                return point
            gradient = flat(loss_gradient(e, self._tensors), self._tensors)
            return dataclasses.replace(point, gradient=gradient)

        return lambda theta: self._evaluated_at(microbatch, theta, point)

    def _nearby(
        self, microbatch: Microbatch, then: Callable[[Evaluation, Recorder | None], T]
    ) -> T | None:
        """The same checks at parameters nearby (see `verify`); None where they fail, too."""
        recorder = Recorder(self._tensors) if self._is_ggn else None
        try:
            return self._evaluated_at(
                microbatch, nearby(self._params), lambda e: then(e, recorder), recorder
            )
        except (TaskError, TryAgain):
            return None

    @property
    def _may_check(self) -> bool:
        """Whether the next microbatch may have to be checked: the first of a step."""
        is_first = self._evaluate_at is not None and not self.products
        return is_first and self._engine.verifier.is_on

    def _kept(
        self, microbatch: Microbatch, e: Evaluation, recorder: Recorder | None
    ) -> tuple[Gradient, Product]:
        if not self._is_ggn:
            return self._kept_hessian(microbatch, e)
        verifier = self._engine.verifier
        ways = self._ways(e, recorder, keep_loss=self._may_check)
        check_dense(ways.parts.gradient)
        if ways.why_no_replay is not None:
            self._engine.warn(
                "curvature products by double backward, because the forward pass cannot be replayed: "
                f"{ways.why_no_replay}"
            )
        found = _FirstRight(next(n for n in ways.programs if n not in verifier.refused))
        if self._may_check and verifier.wants(ways.operations):
            checked = self._checked(microbatch, e, ways)
            if checked is not None:
                found = checked
                verifier.done(ways.operations)
        for name, reason in found.wrong.items():
            verifier.refused.add(name)
            self._engine.warn(f"curvature products by {name} are not used: {reason}")
        if found.name is None:
            raise TaskError(
                f"no product engine is right for this model: {[*found.wrong.values()][-1]}. {suspects(e)}"
                "Products need a forward pass that torch can differentiate twice, or set optim.verify=off "
                "to train with products as they are"
            )
        self._engine.used = found.name
        product = ways.parts.whole(ways.product(found.name))
        if self._engine.captures:
            if found.name == LINEARIZE:
                device = self._params.device
                product = CapturedProduct(product, device, self._engine.warn)
            else:
                self._engine.warn(
                    f"products are not captured as graphs: they are computed by {found.name}"
                )
        return ways.parts.gradient, product

    def _ways(self, e: Evaluation, recorder: Recorder | None, *, keep_loss: bool) -> _Ways:
        parts = GGNParts.of(e, self._tensors, keep=True, keep_loss=keep_loss)
        programs: dict[str, Jacobian | None] = {}
        operations, why_no_replay = [DOUBLE_BACKWARD], None
        if recorder is not None:
            try:
                program = recorder.program(parts.curved_outputs)
                programs[LINEARIZE] = program
                operations = program.operations
            except Unsupported as unsupported:
                why_no_replay = str(unsupported)
        programs[DOUBLE_BACKWARD] = None
        return _Ways(
            parts=parts, programs=programs, operations=operations, why_no_replay=why_no_replay
        )

    def _checked(self, microbatch: Microbatch, e: Evaluation, ways: _Ways) -> _FirstRight | None:
        """What the checks say, at the parameters and, where they fail, nearby; None: nothing to tell by."""

        def again() -> _FirstRight | None:
            def then(e: Evaluation, recorder: Recorder | None) -> _FirstRight | None:
                used = recorder if LINEARIZE in ways.programs else None
                return self._first_right(microbatch, e, self._ways(e, used, keep_loss=True))

            found = self._nearby(microbatch, then)
            return None if found is None or found.name is None else found

        try:
            found = self._first_right(microbatch, e, ways)
        except TaskError:
            found = again()
            if found is None:
                raise
            return found
        return (again() or found) if found is not None and found.wrong else found

    def _first_right(
        self, microbatch: Microbatch, e: Evaluation, ways: _Ways
    ) -> _FirstRight | None:
        verifier = self._engine.verifier
        gradient = ways.parts.gradient
        probe = verifier.check_gradient(self._params, e, gradient, self._point_at(microbatch))
        if probe is None:
            return None
        wrong: dict[str, str] = {}
        for name in ways.programs:
            if name not in verifier.refused:
                reason = verifier.wrong_product(ways.product(name), e, probe)
                if reason is None:
                    return _FirstRight(name, wrong)
                wrong[name] = reason
        return _FirstRight(None, wrong)

    def _kept_hessian(self, microbatch: Microbatch, e: Evaluation) -> tuple[Gradient, Product]:
        gradient, product = self._hessian(e)
        check_dense(gradient)
        if self._may_check and self._engine.verifier.wants(["hessian"]):
            try:
                told = self._check_hessian(microbatch, e, gradient, product)
            except TaskError:
                if not self._nearby(
                    microbatch, lambda e, _: self._check_hessian(microbatch, e, *self._hessian(e))
                ):
                    raise
                told = True
            if told:
                self._engine.verifier.done(["hessian"])
        return gradient, product

    def _hessian(self, e: Evaluation) -> tuple[Gradient, HessianProduct]:
        g = grad(e.loss_sum, self._tensors, create_graph=True, allow_unused=True)
        return [None if gk is None else gk.detach() for gk in g], HessianProduct(g, self._tensors)

    def _check_hessian(
        self, microbatch: Microbatch, e: Evaluation, gradient: Gradient, product: HessianProduct
    ) -> bool:
        """Whether there was something to tell by. Raises: TaskError: Gradient or product is wrong."""
        verifier = self._engine.verifier
        probe = verifier.check_gradient(self._params, e, gradient, self._point_at(microbatch))
        if probe is not None:
            verifier.check_hessian(product, e, gradient, probe)
        return probe is not None


@dataclass(frozen=True, kw_only=True)
class _Ways:
    """The ways to a microbatch's product."""

    parts: GGNParts
    programs: dict[str, Jacobian | None]
    """Of each engine."""
    operations: list[str]
    """What is replayed."""
    why_no_replay: str | None

    def product(self, name: str) -> GGNProduct:
        """By an engine."""
        e = self.parts.evaluation
        return GGNProduct(e.outputs, self.parts.H, self.parts.tensors, self.programs[name])


@dataclass(frozen=True)
class _FirstRight:
    """The first engine whose product is right, if there is one, and what is wrong with those before it."""

    name: str | None
    wrong: dict[str, str] = field(default_factory=dict)


def check_dense(gradient: Gradient) -> None:
    """Raises: TaskError: A gradient is sparse."""
    if any(g is not None and g.is_sparse for g in gradient):
        raise TaskError(
            "the model has sparse gradients, which Hessian-free products cannot use: build its embeddings "
            "with sparse=False"
        )


@contextmanager
def _explained() -> Iterator[None]:
    """What autograd cannot do is the task's: one message. Errors of other kinds are of the task's own hooks
    and backward passes, and keep their words."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise TaskError(
            f"torch cannot differentiate this model and loss as products need it: {type(error).__name__}: "
            f"{explained(error)}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class GGNParts:
    """Derivatives of one microbatch's loss."""

    H: LossHessian
    gradient: Gradient
    """dL/dtheta."""
    direct: Product | None
    """Curvature of what the loss computes from the parameters themselves."""
    evaluation: Evaluation
    tensors: Sequence[Tensor]

    @classmethod
    def of(
        cls, e: Evaluation, tensors: Sequence[Tensor], *, keep: bool, keep_loss: bool = False
    ) -> GGNParts:
        """`keep` the graph of the forward pass for products; `keep_loss`: that of the loss, too.

        Raises:
            ValueError: There are no outputs.
        """
        if not e.outputs:
            raise ValueError(
                "the GGN needs the model's outputs: let forward() return (loss, outputs) with outputs "
                "that depend on the parameters (and not the loss alone), or use curvature_opt='hessian'"
            )
        is_direct = is_reached(e.loss_sum, tensors, without=e.loss_inputs)
        closed = e.closed_form()
        inputs = [*e.loss_inputs, *(tensors if is_direct and e.is_split else ())]
        if closed is None:
            derivatives = grad(e.loss_sum, inputs, create_graph=True, allow_unused=True)
        else:
            retain = closed.needs_graph or is_direct or keep_loss
            derivatives = grad(e.loss_sum, inputs, retain_graph=retain, allow_unused=True)
        dz = derivatives[: len(e.loss_inputs)]
        H: LossHessian
        if closed is None and not e.is_split and are_nested(e.outputs):
            H = hessian_of_arguments(e.loss_sum, e.loss_calls, e.outputs)
        else:
            H = closed or ByDoubleBackward(e.loss_inputs, dz)
        direct = None
        if is_direct:
            direct = direct_product(
                e.loss_sum, e.loss_calls, tensors, e.loss_inputs, is_split=e.is_split
            )
        gradient = _gradient(e, tensors, dz, derivatives[len(dz) :], keep=keep)
        return cls(H=H, gradient=gradient, direct=direct, evaluation=e, tensors=tensors)

    @property
    def curved_outputs(self) -> list[Tensor]:
        return [self.evaluation.outputs[k] for k in self.H.curved]

    def whole(self, product: Product) -> Product:
        """The product with what the loss adds by itself."""
        return product if self.direct is None else SumOfProducts([product, self.direct])


def _gradient(
    e: Evaluation,
    tensors: Sequence[Tensor],
    dz: Sequence[Tensor | None],
    direct: Sequence[Tensor | None],
    keep: bool,
) -> Gradient:
    """dL/dtheta of a pass with dL/dz and, if there is any, the loss's own dL/dtheta at fixed z; keep its
    graph or free it."""
    if not e.is_split:
        return grad(e.loss_sum, tensors, retain_graph=keep, allow_unused=True)
    used = [(z, d.detach()) for z, d in zip(e.outputs, dz) if d is not None]
    gradient: Gradient = [None] * len(tensors)
    if used:
        gradient = grad(
            [z for z, _ in used],
            tensors,
            [d for _, d in used],
            retain_graph=keep,
            allow_unused=True,
        )
    if not direct:
        return gradient
    return added(gradient, [None if d is None else d.detach() for d in direct])


def loss_gradient(e: Evaluation, tensors: Sequence[Tensor]) -> Gradient:
    """dL/dtheta alone; the graph is freed."""
    if not e.is_split:
        return _gradient(e, tensors, (), (), keep=False)
    derivatives = grad(e.loss_sum, [*e.loss_inputs, *tensors], allow_unused=True)
    m = len(e.loss_inputs)
    return _gradient(e, tensors, derivatives[:m], derivatives[m:], keep=False)


Evaluated = Callable[[], tuple[Evaluation, Recorder | None]]


class RecomputedGGNProduct:
    """v -> Gv that keeps nothing between products: a forward pass, its replay, a backward pass each.

    Args:
        evaluated: The microbatch's forward pass; with a recorder, if it is to be replayed.
        tensors: The parameters.
    """

    overlaps = False

    def __init__(self, evaluated: Evaluated, tensors: Sequence[Tensor]) -> None:
        self._evaluated, self._tensors = evaluated, list(tensors)

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        e, recorder = self._evaluated()
        parts = GGNParts.of(e, self._tensors, keep=True)
        jacobian: Jacobian | None = None
        if recorder is not None:
            with suppress(Unsupported):
                jacobian = recorder.program(parts.curved_outputs)
        del recorder
        return parts.whole(GGNProduct(e.outputs, parts.H, self._tensors, jacobian))(v, factor)


class RecomputedHessianProduct(RecomputedGGNProduct):
    """v -> Hv that keeps nothing: reverse over reverse anew for every product."""

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        e, _ = self._evaluated()
        gradient = grad(e.loss_sum, self._tensors, create_graph=True, allow_unused=True)
        return HessianProduct(gradient, self._tensors)(v, factor)
