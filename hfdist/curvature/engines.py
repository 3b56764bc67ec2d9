"""How curvature products are computed: a choice that changes time and memory, not the result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import grad

from hfdist.comm import Communicator
from hfdist.curvature.ggn import GGNProduct, LinearizedGGNProduct
from hfdist.curvature.hessian import HessianProduct
from hfdist.curvature.layout import Product
from hfdist.curvature.linearize import (
    Jacobian,
    Program,
    Recorder,
    Unsupported,
    any_direction,
    by_torch,
    compiled,
)
from hfdist.curvature.loss_hessian import ByDoubleBackward, LossHessian
from hfdist.curvature.memory import MemoryCounter, memory_left
from hfdist.curvature.microbatch import Evaluation, Microbatch
from hfdist.curvature.params import ParameterVector
from hfdist.optim.options import HFOptions

logger = logging.getLogger(__name__)

Gradient = Sequence[Tensor | None]
Evaluate = Callable[[Microbatch, Recorder | None], Evaluation]
OutputsAt = Callable[[Microbatch, Sequence[Tensor]], list[Tensor]]
LINEARIZE, DOUBLE_BACKWARD, RECOMPUTE, AUTO = "linearize", "double_backward", "recompute", "auto"
COMPILE, TORCH_LINEARIZE = "compile", "torch_linearize"


def autocast_dtype(options: HFOptions) -> torch.dtype | None:
    """What `product_autocast` asks for."""
    return torch.bfloat16 if options.product_autocast == "bfloat16" else None


@dataclass(kw_only=True)
class ProductEngine:
    """The engine of a run; it lives as long as the run does.

    Attributes:
        requested: "linearize" replays the forward pass on tangents, "compile" is the same through
            torch.compile, "torch_linearize" is torch.func.linearize, "double_backward" differentiates
            the backward pass, "recompute" keeps nothing between products; "auto" times all but the
            last on the first solve. A forward pass that one cannot have has double backward anyway.
        memory_budget: Bytes for graphs that are kept between products; microbatches beyond it are
            recomputed for each. None: what the device has left.
        chosen: What "auto" chose, here or before the run was resumed.
        products_per_step: For how many products a step's preparations are made, about.
        used: What the last microbatch had, where that is not what was asked for.
    """

    requested: str = LINEARIZE
    memory_budget: int | None = None
    chosen: str | None = None
    products_per_step: int = 50
    used: str | None = None

    @property
    def name(self) -> str:
        """The engine in use; "auto" until it is decided."""
        return (self.chosen or AUTO) if self.requested == AUTO else self.requested

    @property
    def reported(self) -> str:
        """What products were computed by."""
        return self.name if self.requested == AUTO else self.used or self.name

    def decide(self, comm: Communicator, seconds: dict[str, float]) -> None:
        """Choose the fastest engine that works on all ranks. Collective.

        Args:
            seconds: Of one product and its part of the preparations, by engine, on this rank; empty
                if it has no microbatch.
        """
        times = [t for t in comm.all_gather_object(seconds) if t]
        names = [name for name in times[0] if all(name in t for t in times)] if times else []
        self.chosen = min(names, key=lambda name: sum(t[name] for t in times), default=LINEARIZE)
        logger.info("product engine: %s (seconds a product: %s)", self.chosen, seconds)


class ProductBuilder:
    """Turns the microbatches of a role into gradients and products.

    Args:
        engine: The run's engine.
        params: The parameters.
        comm: The ranks, for the engine's decision.
        curvature: "ggn" or "hessian".
        evaluate: A forward pass with graph.
        outputs_at: The outputs with other tensors in the parameters' place; raises `Unsupported`.
        num_microbatches: How many there will be.
    """

    def __init__(
        self,
        engine: ProductEngine,
        params: ParameterVector,
        comm: Communicator,
        curvature: Literal["ggn", "hessian"],
        evaluate: Evaluate,
        outputs_at: OutputsAt,
        num_microbatches: int,
    ) -> None:
        self.products: list[Product] = []
        self._engine, self._params, self._comm = engine, params, comm
        self._tensors = params.tensors
        self._is_ggn = curvature == "ggn"
        self._evaluate, self._outputs_at = evaluate, outputs_at
        self._budget = math.inf
        if engine.memory_budget is not None:
            self._budget = engine.memory_budget
        elif num_microbatches > 1:
            self._budget = memory_left(params.device, comm.world_size)
        if num_microbatches == 0:
            self._decide({})

    @property
    def _is_undecided(self) -> bool:
        return self._is_ggn and self._engine.name == AUTO

    def _decide(self, seconds: dict[str, float]) -> None:
        if self._is_undecided:
            self._engine.decide(self._comm, seconds)

    def add(self, microbatch: Microbatch) -> tuple[Evaluation, Gradient]:
        """Evaluate a microbatch, append its product.

        Returns:
            The evaluation and the gradient of its loss sum.
        """
        if self._budget <= 0 or self._engine.name == RECOMPUTE:
            return self._without_graph(microbatch)
        recorder = None
        if self._is_ggn and self._engine.name in (LINEARIZE, COMPILE, AUTO):
            recorder = Recorder(self._tensors)
        counter = MemoryCounter() if self._budget < math.inf else None
        with counter or nullcontext():
            e = self._evaluate(microbatch, recorder)
            if counter is not None and counter.num_bytes > self._budget:
                self._budget = 0  # and all that follow: memory is full
                self.products.append(self._recomputed(microbatch))
                return e, _gradient_alone(e, self._tensors)
            gradient, product = self._kept(microbatch, e, recorder)
        if counter is not None:
            self._budget -= counter.num_bytes
        self.products.append(product)
        return e, gradient

    def _without_graph(self, microbatch: Microbatch) -> tuple[Evaluation, Gradient]:
        self._decide({})
        e = self._evaluate(microbatch, None)
        self.products.append(self._recomputed(microbatch))
        return e, _gradient_alone(e, self._tensors)

    def _recomputed(self, microbatch: Microbatch) -> Product:
        kind = RecomputedGGNProduct if self._is_ggn else RecomputedHessianProduct
        return kind(lambda recorder: self._evaluate(microbatch, recorder), self._tensors)

    def _kept(
        self, microbatch: Microbatch, e: Evaluation, recorder: Recorder | None
    ) -> tuple[Gradient, Product]:
        if not self._is_ggn:
            g = grad(e.loss_sum, self._tensors, create_graph=True, allow_unused=True)
            product = HessianProduct(g, self._tensors)
            return [None if gk is None else gk.detach() for gk in g], product
        H, dz = _loss_derivatives(e)
        gradient = _gradient(e, self._tensors, dz, keep=True)
        candidates: dict[str, Product] = {}
        preparations: dict[str, float] = {}
        for name, make in self._jacobians(microbatch, e, H, recorder).items():
            try:
                if name == COMPILE and self._is_undecided:
                    make()  # takes long the first time, which comes once a run
                start = time.perf_counter()
                candidates[name] = LinearizedGGNProduct(e.outputs, H, self._tensors, make())
                preparations[name] = time.perf_counter() - start
            except Unsupported as reason:
                logger.info("no products by %s, because %s", name, reason)
        if not candidates or self._engine.name in (DOUBLE_BACKWARD, AUTO):
            candidates[DOUBLE_BACKWARD] = GGNProduct(e.outputs, H, self._tensors)
        if self._is_undecided:
            seconds = _time(candidates, self._params)
            for name in seconds:
                seconds[name] += preparations.get(name, 0.0) / self._engine.products_per_step
            self._decide(seconds)
        name = self._engine.name
        self._engine.used = name if name in candidates else next(iter(candidates))
        return gradient, candidates[self._engine.used]

    def _jacobians(
        self, microbatch: Microbatch, e: Evaluation, H: LossHessian, recorder: Recorder | None
    ) -> dict[str, Callable[[], Jacobian]]:
        """Ways to J that are to be tried, by engine."""

        def replayed() -> Program:
            assert recorder is not None
            return recorder.program([e.outputs[k] for k in H.curved])

        def traced() -> Jacobian:
            def curved_at(theta: Sequence[Tensor]) -> list[Tensor]:
                outputs = self._outputs_at(microbatch, theta)
                return [outputs[k] for k in H.curved]

            return by_torch(curved_at, self._tensors, [e.outputs[k] for k in H.curved])

        ways: dict[str, Callable[[], Jacobian]] = {
            LINEARIZE: replayed,
            COMPILE: lambda: compiled(replayed(), self._tensors),
            TORCH_LINEARIZE: traced,
        }
        to_try = {
            LINEARIZE: [LINEARIZE],
            COMPILE: [COMPILE, LINEARIZE],
            TORCH_LINEARIZE: [TORCH_LINEARIZE],
            # On a CPU the compiler takes longer than its kernels save (docs/speed.md).
            AUTO: [LINEARIZE, TORCH_LINEARIZE] + [COMPILE] * (self._params.device.type == "cuda"),
        }
        return {name: ways[name] for name in to_try.get(self._engine.name, ())}


def _gradient(
    e: Evaluation, tensors: Sequence[Tensor], dz: Sequence[Tensor | None], keep: bool
) -> Gradient:
    """dL/dtheta of a pass with dL/dz; keep its graph or free it."""
    if not e.is_split:
        return grad(e.loss_sum, tensors, retain_graph=keep, allow_unused=True)
    used = [(z, d.detach()) for z, d in zip(e.outputs, dz) if d is not None]
    return grad(
        [z for z, _ in used], tensors, [d for _, d in used], retain_graph=keep, allow_unused=True
    )


def _gradient_alone(e: Evaluation, tensors: Sequence[Tensor]) -> Gradient:
    dz = grad(e.loss_sum, e.loss_inputs, allow_unused=True) if e.is_split else ()
    return _gradient(e, tensors, dz, keep=False)


def _loss_derivatives(e: Evaluation) -> tuple[LossHessian, Sequence[Tensor | None]]:
    """H_L and dL/dz."""
    if not e.outputs:
        raise ValueError(
            "the GGN needs the model's outputs: let forward() return (loss, outputs) with outputs "
            "that depend on the parameters, or use curvature_opt='hessian'"
        )
    closed = e.closed_form()
    if closed is not None:
        keep = closed.needs_graph
        return closed, grad(e.loss_sum, e.loss_inputs, retain_graph=keep, allow_unused=True)
    dz = grad(e.loss_sum, e.loss_inputs, create_graph=True, allow_unused=True)
    return ByDoubleBackward(e.loss_inputs, dz), dz


class RecomputedGGNProduct:
    """v -> Gv that keeps nothing between products: a forward pass, its replay, a backward pass each.

    Args:
        evaluate: The microbatch's forward pass.
        tensors: The parameters.
    """

    overlaps = False
    """Whether the parameters' gradient hooks fire only for the result."""

    def __init__(
        self, evaluate: Callable[[Recorder | None], Evaluation], tensors: Sequence[Tensor]
    ) -> None:
        self._evaluate, self._tensors = evaluate, list(tensors)

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        recorder = Recorder(self._tensors)
        e = self._evaluate(recorder)
        H, _ = _loss_derivatives(e)
        z = [e.outputs[k] for k in H.curved]
        try:
            program = recorder.program(z)
        except Unsupported:
            return GGNProduct(e.outputs, H, self._tensors)(v, factor)
        del recorder
        return LinearizedGGNProduct(e.outputs, H, self._tensors, program)(v, factor)


class RecomputedHessianProduct(RecomputedGGNProduct):
    """v -> Hv that keeps nothing: reverse over reverse anew for every product."""

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        e = self._evaluate(None)
        gradient = grad(e.loss_sum, self._tensors, create_graph=True, allow_unused=True)
        return HessianProduct(gradient, self._tensors)(v, factor)


def _time(candidates: dict[str, Product], params: ParameterVector) -> dict[str, float]:
    """Seconds a product of those that agree with double backward."""
    reference = candidates[DOUBLE_BACKWARD]
    views = any_direction(params.tensors)
    expected = params.flatten(reference(views))
    tolerance = math.sqrt(torch.finfo(params.dtype).eps)
    agreeing: dict[str, Product] = {}
    for name, product in candidates.items():
        error = (params.flatten(product(views)) - expected).norm()
        if float(error) <= tolerance * float(expected.norm()):
            agreeing[name] = product
        else:
            logger.warning("product engine %s disagrees with double backward: not used", name)
    seconds = dict.fromkeys(agreeing, math.inf)
    for _ in range(3):
        for name, product in agreeing.items():
            _synchronize(params.device)
            start = time.perf_counter()
            product(views)
            _synchronize(params.device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
