"""One step's objective on real data: sums over microbatches and ranks, divided by a global weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hfdist.comm import Communicator, SerialCommunicator
from hfdist.curvature.dispatch import Watch
from hfdist.curvature.engines import (
    DOUBLE_BACKWARD,
    LINEARIZE,
    RECOMPUTE,
    ProductBuilder,
    ProductEngine,
    check_dense,
)
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.jacobian_rows import UseWatch
from hfdist.curvature.layout import Layout, Product, Replicated, SummedProduct, add_scaled
from hfdist.curvature.least_squares import ResidualSystem
from hfdist.curvature.linearize import Recorder
from hfdist.curvature.microbatch import Evaluation, Microbatch, TryAgain
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.reverse import grad
from hfdist.curvature.step_memory import GRAPHS, LOSSES, METRIC, StepMemory
from hfdist.curvature.structural import (
    LEAST_EXAMPLES,
    Scaled,
    StructuralDamping,
    add_hidden,
    count,
)
from hfdist.curvature.verify import Verifier
from hfdist.errors import DataError
from hfdist.optim.least_squares import LeastSquares
from hfdist.optim.objective import Costs, Operator
from hfdist.optim.secants import Secants

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Roles:
    """This rank's microbatches by what they are used for [2, sec. 12]. The same list object in two
    roles means the same examples, whose forward pass is then shared."""

    gradient: Sequence[Microbatch]
    curvature: Sequence[Microbatch]
    loss: Sequence[Microbatch]


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """Parts of the objective that the caller computes."""

    gradient: Tensor | None = None
    """Gradient [P] in place of the derivative of the loss."""
    product: Operator | None = None
    """Undamped curvature product in place of autograd's, of whole vectors [P]."""
    preconditioner: Callable[[Problem, float | None], Operator | None] | None = None
    """(this objective, damping) -> product with an approximate inverse, of this rank's parts; without
    damping: of the metric of a Krylov space."""
    damping_metric: Callable[[Problem], Tensor] | None = None
    """This objective -> this rank's part of the diagonal D of the damping term; see `damping_metric.py`."""
    secants: Secants | None = None
    """What earlier steps showed; None: every step is solved anew."""
    move: Callable[[float, Tensor], None] | None = None
    """(alpha, step [P]) -> what is done with an accepted step instead of moving the parameters by it."""


@dataclass(kw_only=True)
class Regularisation:
    """L2 term and damping metric; scalars, or diagonals [P] where parameter groups differ."""

    weight_decay: float | Tensor = 0.0
    damping_scale: Tensor | None = None

    def part(self, part_of: Callable[[Tensor], Tensor]) -> Regularisation:
        """The same for this rank's parts of vectors."""

        def of(value: T) -> T:
            return part_of(value) if isinstance(value, Tensor) else value  # type: ignore[return-value]

        return Regularisation(
            weight_decay=of(self.weight_decay), damping_scale=of(self.damping_scale)
        )

    def __bool__(self) -> bool:
        """Whether there is an L2 term."""
        return isinstance(self.weight_decay, Tensor) or self.weight_decay != 0.0

    def loss(self, theta: Tensor) -> Tensor:
        """sum_i weight_decay_i theta_i^2 / 2, a float64 scalar on the device."""
        if isinstance(self.weight_decay, Tensor):
            return 0.5 * torch.dot(self.weight_decay * theta, theta).double()
        if self.weight_decay == 0.0:
            return torch.zeros((), dtype=torch.float64, device=theta.device)
        return 0.5 * self.weight_decay * torch.dot(theta, theta).double()

    def shift(self, damping: float) -> float | Tensor:
        """weight_decay + damping * damping_scale: what both add to the diagonal of the curvature."""
        scale = 1.0 if self.damping_scale is None else self.damping_scale
        return self.weight_decay + damping * scale


@dataclass(kw_only=True)
class Problem:
    """The `hfdist.optim.objective.Objective` of a model on batches.

    Values: with reduction "mean", (sum over all ranks and microbatches of the losses) / (sum of the
    weights), exact for uneven shards; with "sum", that times the weight of the gradient role, so that
    roles of different size see the same objective; with "plain_sum", the sum alone.

    Raises (from its methods):
        DataError: The weights of a role add up to nothing.
    """

    params: ParameterVector
    roles: Roles
    comm: Communicator = field(default_factory=SerialCommunicator)
    curvature_opt: Literal["ggn", "hessian"] = "ggn"
    reduction: Literal["mean", "sum", "plain_sum"] = "mean"
    regularisation: Regularisation = field(default_factory=Regularisation)
    overrides: Overrides = field(default_factory=Overrides)
    frozen: FixedRandomness | None = None
    layout: Layout | None = None
    """How solver vectors lie over ranks; None: whole on each."""
    engine: ProductEngine = field(default_factory=ProductEngine)
    """How products are computed; shared by the steps of a run."""
    autocast: torch.dtype | None = None
    """Forward passes of products run under `torch.autocast` to this dtype."""
    residuals: bool = False
    """The objective is a sum of squares of the outputs (a `ResidualTask`'s), whose rows a solver may ask
    for."""
    row_solver: bool = False
    """The solver asks for rows, not for products: they come from the gradient's forward pass."""
    structural: StructuralDamping | None = None
    """A further term of the curvature, for recurrent nets."""
    abandon: Callable[[], float] | None = None
    """Above 0 if this rank asks to abandon the step; summed over ranks with every product."""
    on_product: Callable[[Tensor, Tensor], None] | None = None
    """Called with v and Bv, without damping and L2, of every product; this rank's parts."""
    on_direction: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """Called with u, Bu and Cu of every direction of a Krylov space in the metric C; this rank's parts."""
    memory: StepMemory | None = None
    """What the step's parts take of a device; None: begun here."""

    def __post_init__(self) -> None:
        self._layout: Layout = self.layout or Replicated(self.params, self.comm)
        self._part_of_decay = self.regularisation.part(self._layout.part)
        self._fixed = self.frozen or FixedRandomness(self.params.device)
        self._trial: Tensor | None = None
        self._reference_weight: float | None = None
        self._loss_weight = 0.0
        self._gradient: Tensor | None = None
        self._gradient_loss: float | None = None
        self._start_loss: float | None = None
        self._products: list[Product] | None = None
        self._product_weight = 0.0
        self._system: ResidualSystem | None = None
        self._metric_work = self._row_work = 0.0
        self._rows_make_gradient = False
        self._has_damping_metric = False
        self._summed: SummedProduct | None = None
        self._summed_with = 0.0  # of S
        self._summed_structural: SummedProduct | None = None
        self._hidden_products: list[Product] | None = None
        self._hidden_share = 0.0  # of the curvature's examples
        self._memory = self.memory or StepMemory(self.params.device)

    @property
    def gradient(self) -> Tensor:
        """This rank's part, once `loss_and_gradient` was called; do not write into it."""
        if self._gradient is None:
            raise RuntimeError("the gradient is not known yet")
        return self._gradient

    @property
    def gradient_scale(self) -> float:
        """Factor on sums over the gradient role's examples, once `loss_and_gradient` was called."""
        if self._reference_weight is None:
            raise RuntimeError("the weight of the gradient role is not known yet")
        return self._scale(self._reference_weight)

    @property
    def gradient_weight(self) -> float:
        """Weight of the gradient role's examples, once `loss_and_gradient` was called."""
        return self._reference_weight or 1.0

    def scale(self, weight: float) -> float:
        """Factor on sums over examples of the given weight, in place of all of the gradient's.

        Raises:
            DataError: The weight is zero.
        """
        _check_weight(weight, "gradient")
        return self._scale(weight)

    def sum_to_part(self, local: Tensor) -> Tensor:
        """This rank's part of the sum over ranks of vectors [P]."""
        return self._layout.sum_to_part(local)

    def count_statistics(self, weight: float, gradients: float = 5 / 3) -> None:
        """Note for `costs` that statistics of a preconditioner were taken.

        Args:
            weight: Of their examples.
            gradients: Work of all examples of the gradient: forward pass, a backward pass without the
                weights' part, and the factors' outer products are about 5 matrix products a layer.
        """
        self._metric_work += gradients * weight / (self._reference_weight or 1.0)

    def count_products(self, number: int) -> None:
        """Note for `costs` that a preconditioner took curvature products."""
        self._metric_work += number * self.costs.product

    @property
    def part_numel(self) -> int:
        """Length of this rank's parts."""
        return self._layout.part(self.params.zeros()).numel()

    @property
    def part_spans(self) -> list[tuple[int, int]]:
        """Of each parameter: which numbers of this rank's parts are its own; none may be."""
        n = self.part_numel
        first = self.comm.rank * n if self.is_sharded else 0
        clipped = ((start - first, stop - first) for start, stop in self.params.spans)
        return [(min(max(a, 0), n), min(max(b, 0), n)) for a, b in clipped]

    def whole(self, part: Tensor) -> Tensor:
        """The whole vector of the ranks' parts; do not write into it. Collective."""
        return self._layout.whole(part)

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole vector [P]; a view where possible."""
        return self._layout.part(whole)

    def shift_part(self, damping: float = 0.0) -> float | Tensor:
        """weight_decay + damping * damping_scale, of this rank's parts."""
        if damping:
            self._find_damping_metric()
        return self._part_of_decay.shift(damping)

    def _find_damping_metric(self) -> None:
        """Let `overrides.damping_metric` say what lambda multiplies; once."""
        if self.overrides.damping_metric is not None and not self._has_damping_metric:
            self._has_damping_metric = True
            diagonal, groups = (
                self.overrides.damping_metric(self),
                self._part_of_decay.damping_scale,
            )
            scale = diagonal if groups is None else diagonal * groups
            self._part_of_decay = dataclasses.replace(self._part_of_decay, damping_scale=scale)

    def of_whole(self, operator: Operator) -> Operator:
        """An operator on whole vectors [P] as one on this rank's parts."""
        return lambda v: self._layout.part(operator(self._layout.whole(v)))

    def evaluate_split(
        self, microbatch: Microbatch, watch: AbstractContextManager[Any]
    ) -> Evaluation:
        """A forward pass with graph, whose loss is apart from the outputs where that is possible.

        Args:
            microbatch: Of any role, or a part of one.
            watch: A context around the forward pass.
        """
        while True:
            with torch.enable_grad(), self._fixed.evaluation(microbatch.seed), watch:
                try:
                    return microbatch.evaluate(self.engine.traits, None)
                except TryAgain:
                    continue

    def evaluation(self, microbatch: Microbatch) -> AbstractContextManager[None]:
        """A forward pass of the microbatch inside sees the step's random numbers, and leaves no trace."""
        return self._fixed.evaluation(microbatch.seed)

    # -- gradient --------------------------------------------------------------------------------

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Loss and gradient [P]; one forward pass a microbatch, shared with the curvature's where the
        examples are the same."""
        with self._memory.part(GRAPHS):
            return self._loss_and_gradient()

    def _loss_and_gradient(self) -> tuple[float, Tensor]:
        own_gradient = self.overrides.gradient
        share = (
            self.overrides.product is None
            and self.autocast is None
            and self.roles.curvature is self.roles.gradient
        )
        system = None
        if share and self.row_solver:
            share, system = False, self._new_system()
            self._rows_make_gradient = own_gradient is None
        g = self.params.zeros()
        sums = torch.zeros(2, dtype=torch.float64, device=self.params.device)  # loss, weight
        builder = self._builder(self.roles.gradient, record=True) if share else None
        for microbatch in self.roles.gradient:
            gradient: Sequence[Tensor | None] = []
            if builder is not None:
                evaluation, gradient = builder.add(microbatch)
            elif system is not None:
                evaluation, gradient = system.add(microbatch)
            elif own_gradient is None:
                evaluation = self._evaluate(microbatch, record=True)
                gradient = grad(evaluation.loss_sum, self.params.tensors, allow_unused=True)
            else:
                evaluation = self._evaluate(microbatch, record=True)
            if own_gradient is None:
                check_dense(gradient)
                self.params.add(g, gradient)
            sums += _as_sums(evaluation, sums)
        self.comm.all_reduce(sums)
        loss_sum, weight, penalty = torch.cat((sums, self._start_penalty().reshape(1))).tolist()
        _check_weight(weight, "gradient")
        self._reference_weight = weight
        scale = self._scale(weight)
        if own_gradient is None:
            g = self._layout.sum_to_part(g).mul_(scale)
            if self.regularisation:
                theta = self._layout.part(self.params.read())
                add_scaled(g, self._part_of_decay.weight_decay, theta)
        else:
            g = self._layout.part(own_gradient.detach().to(self.params.dtype)).clone()
        if builder is not None:
            self._products, self._product_weight = builder.products, weight
            self._summed = None
        if system is not None:
            system.close(1.0 / scale)
            self._system, self._product_weight = system, weight
        self._gradient, self._gradient_loss = g, loss_sum * scale + penalty
        if self.roles.loss is self.roles.gradient:
            self._start_loss = self._gradient_loss
        return self._gradient_loss, g

    def _builder(self, role: Sequence[Microbatch], record: bool) -> ProductBuilder:
        recorded: set[int] = set() if record else {id(m) for m in role}

        def evaluate(microbatch: Microbatch, recorder: Recorder | None) -> Evaluation:
            # What a pass moves the buffers to counts once, however often it is repeated.
            first = id(microbatch) not in recorded
            evaluation = self._evaluate(
                microbatch,
                split=True,
                record=first,
                recorder=recorder,
                autocast=self.autocast,
            )
            recorded.add(id(microbatch))
            return evaluation

        def evaluate_at(
            microbatch: Microbatch,
            theta: Tensor,
            then: Callable[[Evaluation], T],
            recorder: Recorder | None = None,
        ) -> T:
            with self.params.at(theta):
                return then(self._evaluate(microbatch, split=True, recorder=recorder))

        return ProductBuilder(
            self.engine,
            self.params,
            self.comm,
            self.curvature_opt,
            evaluate,
            # Rounded to bfloat16, nothing can be told from a difference.
            evaluate_at if self.autocast is None else None,
            len(role),
        )

    # -- curvature -------------------------------------------------------------------------------

    def curvature(self, damping: float = 0.0, exact: bool = False) -> Operator:
        """v [n] -> (B + damping * (D + mu S)) v [n]: one vector reduction a product, in full precision if
        `exact`; D is the damping metric, mu S structural damping."""
        if self.overrides.product is not None:
            return self._own_product(self.overrides.product, damping)
        if self._products is None:
            with self._memory.part(GRAPHS):
                self._build_products()
        term = self.structural
        coefficient = 0.0 if term is None else damping * term.mu
        if self._summed is None or self._summed_with != coefficient:
            hidden = self._structural_products() if coefficient else []
            scaled: list[Product] = [Scaled(product=p, number=coefficient) for p in hidden]
            # The loss's products last: what comes last overlaps its reduction.
            products = [*scaled, *(self._products or [])]
            factor = self._scale(self._product_weight)
            self._summed = self._layout.summed(products, factor, self._abort_flag)
            self._summed_with = coefficient
        # L2 and damping add the same kind of term: one diagonal, one pass over the vectors.
        shift = self.shift_part(damping)
        return self._observed(self._summed.damped(shift, exact), shift)

    def _observed(self, product: Operator, shift: float | Tensor) -> Operator:
        if self.on_product is None:
            return product
        observe = self.on_product

        def B(v: Tensor) -> Tensor:
            out = product(v)
            observe(v, out - shift * v)
            return out

        return B

    def _abort_flag(self) -> float:
        return 0.0 if self.abandon is None else float(self.abandon())

    @property
    def signal(self) -> Tensor | None:
        return None if self._summed is None else self._summed.signal

    @property
    def numel(self) -> int:
        return self.params.numel

    @property
    def product_engine(self) -> str:
        if self.overrides.product is not None:
            return "own"
        if self.curvature_opt == "hessian" and self.engine.requested != "recompute":
            return "double_backward"
        return self.engine.reported

    @property
    def is_sharded(self) -> bool:
        return self._layout.is_sharded

    def total(self, scalars: Tensor) -> Tensor:
        return self._layout.total(scalars)

    @property
    def total_of(self) -> Callable[[Tensor], Tensor]:
        """`total` for longer than a step: it keeps none of the step's data alive."""
        return self._layout.total

    @property
    def secants(self) -> Secants | None:
        kept = self.overrides.secants
        return None if kept is None else kept.cut(self.part_of)

    @property
    def see(self) -> Callable[[Tensor, Tensor, Tensor], None] | None:
        # Groups with a damping of their own scale the metric: C is another there.
        return self.on_direction if self.damping_scale is None else None

    def _own_product(self, product: Operator, damping: float) -> Operator:
        out = torch.zeros_like(self._layout.part(self.params.zeros()))
        shift = Regularisation(damping_scale=self.damping_scale).shift(damping)

        def B(v: Tensor) -> Tensor:
            out.copy_(self._layout.part(product(self._layout.whole(v))))
            return add_scaled(out, shift, v)

        return B

    def _build_products(self) -> None:
        weight = torch.zeros(1, dtype=torch.float64, device=self.params.device)
        builder = self._builder(self.roles.curvature, record=False)
        for microbatch in self.roles.curvature:
            weight += builder.add(microbatch)[0].weight
        self.comm.all_reduce(weight)
        self._products, self._product_weight = builder.products, float(weight)
        _check_weight(self._product_weight, "curvature")

    @property
    def structural_matrix(self) -> Operator | None:
        if self.structural is None or self.overrides.product is not None:
            return None
        if self._summed_structural is None:
            products = self._structural_products()
            factor = self._scale(self._product_weight)
            self._summed_structural = self._layout.summed(products, factor, self._abort_flag)
        return self._summed_structural.damped(0.0)

    def _structural_products(self) -> list[Product]:
        """This rank's products with S; as with the loss's, their sum is divided by the weight."""
        if self._hidden_products is not None:
            return self._hidden_products
        term = self.structural
        assert term is not None
        requested = DOUBLE_BACKWARD if self.engine.reported == DOUBLE_BACKWARD else LINEARIZE
        if self.engine.requested == RECOMPUTE:
            requested = RECOMPUTE
        engine = ProductEngine(
            requested=requested,
            memory_budget=self.engine.memory_budget,
            verifier=Verifier(mode="off"),  # the loss's own products were checked
        )

        def evaluate(microbatch: Microbatch, recorder: Recorder | None) -> Evaluation:
            with torch.enable_grad(), self._fixed.evaluation(microbatch.seed):
                return microbatch.evaluate(engine.traits, recorder)

        role = self.roles.curvature
        n = sum(count(microbatch) for microbatch in role)
        num_examples = float(self.comm.all_reduce(self._number(n)))
        share = max(term.share, LEAST_EXAMPLES / num_examples)
        while True:
            builder = ProductBuilder(
                engine, self.params, self.comm, "ggn", evaluate, None, len(role)
            )
            kept = sum(add_hidden(builder, m, term.modules, share) for m in role)
            num_kept = float(self.comm.all_reduce(self._number(kept)))
            if num_kept:
                break
            share = 1.0  # by chance there was none
        self._hidden_share = num_kept / num_examples
        # As means of all examples, which is what they are divided by.
        self._hidden_products = [
            Scaled(product=product, number=1.0 / self._hidden_share) for product in builder.products
        ]
        return self._hidden_products

    def _number(self, value: float) -> Tensor:
        return torch.full((1,), value, dtype=torch.float64, device=self.params.device)

    @property
    def least_squares(self) -> LeastSquares | None:
        if not self.residuals or self.overrides.product is not None:
            return None
        if self._system is None:
            self._system = self._new_system()
            weight = torch.zeros(1, dtype=torch.float64, device=self.params.device)
            for microbatch in self.roles.curvature:
                weight += self._system.add(microbatch)[0].weight
            self.comm.all_reduce(weight)
            self._product_weight = float(weight)
            _check_weight(self._product_weight, "curvature")
            self._system.close(1.0 / self._scale(self._product_weight))
        return self._system

    def _new_system(self) -> ResidualSystem:
        recorded = (
            {id(m) for m in self.roles.gradient} if self._gradient_loss is not None else set()
        )

        def evaluate(microbatch: Microbatch, watch: UseWatch | None) -> Evaluation:
            record = watch is not None and id(microbatch) not in recorded
            recorded.add(id(microbatch))
            return self._evaluate(microbatch, split=True, record=record, recorder=watch)

        return ResidualSystem(
            evaluate,
            self.params,
            self.comm,
            self.engine.rows,
            memory_budget=self.engine.memory_budget,
            weight_decay=self.regularisation.weight_decay,
            at=self.params.at,
            warn=self.engine.warn,
        )

    @property
    def costs(self) -> Costs:
        reference = self._reference_weight or 1.0
        curvature = self._product_weight / reference
        loss = 1.0 if self.roles.loss is self.roles.gradient else self._loss_weight / reference
        shares_pass = self.roles.curvature is self.roles.gradient and self.autocast is None
        rows = self._row_work + (0.0 if self._system is None else self._system.work)
        own_pass = not shares_pass and not rows
        of_loss = 2.0 if self.curvature_opt == "hessian" else 4 / 3
        return Costs(
            gradient=(not self._rows_make_gradient)
            + curvature / 3 * (own_pass + self._hidden_share),
            product=curvature * (of_loss + 4 / 3 * self._hidden_share),
            loss=loss / 3,
            curvature_share=curvature,
            metric=self._metric_work,
            rows=curvature * rows,
        )

    def release(self) -> None:
        if self._system is not None:
            self._row_work += self._system.work
        with self._memory.part(GRAPHS):
            self._products = self._summed = self._system = self._gradient = None
            self._hidden_products = self._summed_structural = None

    def preconditioner(self, damping: float | None) -> Operator | None:
        make = self.overrides.preconditioner
        with self._memory.part(METRIC):
            return None if make is None else make(self, damping)

    @property
    def damping_scale(self) -> Tensor | None:
        self._find_damping_metric()
        return self._part_of_decay.damping_scale

    # -- losses ----------------------------------------------------------------------------------

    def start_loss(self) -> float:
        if self._start_loss is None:
            self._start_loss = self._values([self._loss_sums()], [self._start_penalty()])[0]
        return self._start_loss

    def losses(self, steps: Iterable[tuple[float, Tensor]]) -> list[float]:
        """All candidates of one call share one scalar reduction."""
        with self._memory.part(LOSSES):
            return self._losses(steps)

    def _losses(self, steps: Iterable[tuple[float, Tensor]]) -> list[float]:
        if self._trial is None:  # not before CG's vectors are gone
            self._trial = self.params.zeros()
        sums: list[Tensor] = []
        penalties: list[Tensor] = []
        last: tuple[Tensor, Tensor] | None = None
        for alpha, delta in steps:
            if last is None or last[0] is not delta:
                last = delta, self._layout.whole(delta)
            theta = self.params.moved(alpha, last[1], self._trial)
            penalties.append(self.regularisation.loss(theta))
            with self.params.at(theta):
                sums.append(self._loss_sums())
        return self._values(sums, penalties)

    def _loss_sums(self) -> Tensor:
        """[2] float64: this rank's sum of losses and weights, where the parameters are now."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.params.device)
        for microbatch in self.roles.loss:
            sums += _as_sums(self._evaluate(microbatch), sums)
        return sums

    def _values(self, sums: Sequence[Tensor], penalties: Sequence[Tensor]) -> list[float]:
        summed = self.comm.all_reduce(torch.stack(list(sums)))
        # The host looks at all of them once: every look waits for the device.
        rows = torch.cat((summed, torch.stack(list(penalties)).unsqueeze(1)), 1).tolist()
        for _, weight, _ in rows:
            _check_weight(weight, "line_search")
        self._loss_weight = rows[0][1]
        return [loss_sum * self._scale(weight) + penalty for loss_sum, weight, penalty in rows]

    def _start_penalty(self) -> Tensor:
        theta = self.params.read() if self.regularisation else self.params.tensors[0]
        return self.regularisation.loss(theta)

    # -- the rest --------------------------------------------------------------------------------

    def move(self, alpha: float, delta: Tensor) -> None:
        """Move the parameters, and the batch-norm statistics to where this step's gradient saw them."""
        delta = self._layout.whole(delta)
        # All memory is taken before the first parameter is written: a step is whole, or not there.
        moved = self._fixed.moved_buffers()
        if moved is not None:
            moved = self.comm.all_reduce(moved)
        if self.overrides.move is None and self._trial is None:
            self._trial = self.params.zeros()
        values = [] if moved is None else self._fixed.values(moved)
        if self.overrides.move is not None:
            self.overrides.move(alpha, delta)
        else:
            assert self._trial is not None
            self.params.write(self.params.moved(alpha, delta, self._trial))
        self._fixed.set(values)

    def agree(self, decision: T) -> T:
        return self.comm.broadcast_object(decision)

    def _scale(self, weight: float) -> float:
        """Factor on a sum of losses (or of their derivatives) over examples of the given weight."""
        if self.reduction == "plain_sum":
            return 1.0
        if self.reduction == "sum":
            reference = weight if self._reference_weight is None else self._reference_weight
            return reference / weight
        return 1.0 / weight

    def _evaluate(
        self,
        microbatch: Microbatch,
        *,
        split: bool = False,
        record: bool = False,
        recorder: Watch | None = None,
        autocast: torch.dtype | None = None,
    ) -> Evaluation:
        # Only the Gauss-Newton product looks at loss and outputs apart.
        split = split and self.curvature_opt == "ggn"
        with (
            # Also where only the value counts: some modules compute by other kernels without.
            torch.enable_grad(),
            nullcontext()
            if autocast is None
            else torch.autocast(self.params.device.type, dtype=autocast),
            self._fixed.evaluation(microbatch.seed),
        ):
            evaluation = microbatch.evaluate(self.engine.traits if split else None, recorder)
            if record:
                self._fixed.record(evaluation.weight)
            return evaluation


def _as_sums(e: Evaluation, like: Tensor) -> Tensor:
    """[2] float64: sum of the losses, weight."""
    weight = e.weight
    if isinstance(weight, Tensor):
        weight = weight.reshape(()).to(like)
    else:  # filled in there: a copy from the host would wait for what the device has to do
        weight = like.new_full((), weight)
    return torch.stack((e.loss_sum.detach().to(like), weight))


def _check_weight(weight: float, role: str) -> None:
    if weight == 0:
        raise DataError(
            f"the weights of the {role} batch add up to 0 (all targets masked?): "
            f"make batches.{role} larger, or mask fewer targets"
        )
