"""How curvature products are computed: a choice that changes time and memory, not the result."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import grad

from hfdist.comm import Communicator
from hfdist.curvature.direct import direct_product
from hfdist.curvature.ggn import GGNProduct, SumOfProducts, added
from hfdist.curvature.hessian import HessianProduct
from hfdist.curvature.jacobian_rows import RowMethod
from hfdist.curvature.layout import Product
from hfdist.curvature.linearize import Jacobian, Recorder, Unsupported
from hfdist.curvature.loss_hessian import ByDoubleBackward, LossHessian
from hfdist.curvature.memory import MemoryCounter, memory_left
from hfdist.curvature.microbatch import Evaluation, LossTraits, Microbatch, TryAgain
from hfdist.curvature.outputs import is_reached
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.verify import EvaluateAt, Point, Verifier, explained, flat, suspects
from hfdist.errors import TaskError
from hfdist.optim.options import HFOptions

logger = logging.getLogger(__name__)

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
        verifier: Checks gradients and products against differences of losses and outputs.
        traits: What was found out about the loss.
        rows: How rows of the Jacobian of residuals are computed.
        used: What the last microbatch had, where that is not what was asked for.
    """

    requested: str = LINEARIZE
    memory_budget: int | None = None
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
        self._counter: MemoryCounter | None = None
        if engine.memory_budget is not None:
            self._budget = engine.memory_budget
        elif num_microbatches > 1:
            self._budget = memory_left(params.device, comm.world_size)

    def add(self, microbatch: Microbatch) -> tuple[Evaluation, Gradient]:
        """Evaluate a microbatch, append its product.

        Returns:
            The evaluation and the gradient of its loss sum.

        Raises:
            TaskError: Loss and gradient disagree, or no engine has right products.
        """
        if self._budget <= 0 or self._engine.requested == RECOMPUTE:
            return self._without_graph(microbatch)
        replays = self._is_ggn and self._engine.requested == LINEARIZE
        counter = self._counter = MemoryCounter() if self._budget < math.inf else None
        with counter or nullcontext():
            e, recorder = self._evaluated(microbatch, replays)
            if counter is not None and counter.num_bytes > self._budget:
                self._budget = 0  # and all that follow: memory is full
                self.products.append(self._recomputed(microbatch))
                return e, loss_gradient(e, self._tensors)
            with _explained():
                gradient, product = self._kept(microbatch, e, recorder)
        if counter is not None:
            self._budget -= counter.num_bytes
        self.products.append(product)
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
        if self._engine.verifier.is_on and self._evaluate_at is not None and not self.products:
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

    def _point_at(self, microbatch: Microbatch) -> Callable[[Tensor], Point]:
        @torch.no_grad()  # what is computed here is none of the program's
        def point(e: Evaluation) -> Point:
            point = Point.of(e)
            if self._is_ggn:
                return point
            gradient = flat(loss_gradient(e, self._tensors), self._tensors)
            return dataclasses.replace(point, gradient=gradient)

        def at(theta: Tensor) -> Point:
            assert self._evaluate_at is not None
            counted = 0 if self._counter is None else self._counter.num_bytes
            found = self._evaluate_at(microbatch, theta, point)
            if self._counter is not None:
                self._counter.num_bytes = counted  # it is let go of
            return found

        return at

    def _checks(self, operations: Sequence[str]) -> bool:
        """Whether this microbatch is to be checked: the first of a step."""
        is_first = self._evaluate_at is not None and not self.products
        return is_first and self._engine.verifier.wants(operations)

    def _kept(
        self, microbatch: Microbatch, e: Evaluation, recorder: Recorder | None
    ) -> tuple[Gradient, Product]:
        if not self._is_ggn:
            return self._kept_hessian(microbatch, e)
        verifier = self._engine.verifier
        may_check = self._evaluate_at is not None and not self.products and verifier.is_on
        parts = GGNParts.of(e, self._tensors, keep=True, keep_loss=may_check)
        check_dense(parts.gradient)
        programs: dict[str, Jacobian | None] = {}
        operations = [DOUBLE_BACKWARD]
        if recorder is not None:
            try:
                program = recorder.program(parts.curved_outputs)
                programs[LINEARIZE] = program
                operations = program.operations
            except Unsupported as unsupported:
                self._engine.warn(
                    "curvature products by double backward, because the forward pass cannot be replayed: "
                    f"{unsupported}"
                )
        programs[DOUBLE_BACKWARD] = None
        checks = self._checks(operations)
        probe = None
        if checks:
            probe = verifier.check_gradient(
                self._params, e, parts.gradient, self._point_at(microbatch)
            )
        reason: str | None = None
        for name, jacobian in programs.items():
            if name in verifier.refused:
                continue
            product = GGNProduct(e.outputs, parts.H, self._tensors, jacobian)
            reason = verifier.wrong_product(product, e, probe) if probe is not None else None
            if reason is None:
                self._engine.used = name
                if probe is not None:
                    verifier.done(operations)
                return parts.gradient, parts.whole(product)
            verifier.refused.add(name)
            self._engine.warn(f"curvature products by {name} are not used: {reason}")
        raise TaskError(
            f"no product engine is right for this model: {reason}. {suspects(e)}"
            "Products need a forward pass that torch can differentiate twice, or set optim.verify=off "
            "to train with products as they are"
        )

    def _kept_hessian(self, microbatch: Microbatch, e: Evaluation) -> tuple[Gradient, Product]:
        g = grad(e.loss_sum, self._tensors, create_graph=True, allow_unused=True)
        gradient = [None if gk is None else gk.detach() for gk in g]
        check_dense(gradient)
        product = HessianProduct(g, self._tensors)
        if self._checks(["hessian"]):
            verifier = self._engine.verifier
            probe = verifier.check_gradient(self._params, e, gradient, self._point_at(microbatch))
            if probe is not None:
                verifier.check_hessian(product, e, gradient, probe)
                verifier.done(["hessian"])
        return gradient, product


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
        raise TaskError(
            f"torch cannot differentiate this model and loss twice: {type(error).__name__}: "
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
        H: LossHessian = closed or ByDoubleBackward(e.loss_inputs, dz)
        direct = None
        if is_direct:
            direct = direct_product(
                e.loss_sum, e.loss_calls, tensors, e.loss_inputs, is_split=e.is_split
            )
        gradient = _gradient(e, tensors, dz, derivatives[len(dz) :], keep=keep)
        return cls(H=H, gradient=gradient, direct=direct, evaluation=e)

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
