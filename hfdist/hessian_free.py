"""HessianFree: the optimizer for a training loop of one's own.

A drop-in for PyTorchHessianFree's class of the same name, on any number of processes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hfdist.comm import Communicator, current_communicator
from hfdist.curvature.engines import ProductEngine, autocast_dtype
from hfdist.curvature.example_signs import example_seeds
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.layout import Layout, make_layout
from hfdist.curvature.loss_weight import mean_weight
from hfdist.curvature.memory import reserved_bytes
from hfdist.curvature.microbatch import (
    Microbatch,
    as_sum,
    chosen,
    from_closure,
    from_parts,
    has_batch_statistics,
    rows_of,
)
from hfdist.curvature.objective import Overrides, Problem, Regularisation, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.preconditioners import (
    Context,
    DiagonalPreconditioner,
    empirical_fisher_diagonal,
    make_preconditioner,
)
from hfdist.curvature.preconditioners.memory import PreconditionerMemory
from hfdist.curvature.step_memory import StepMemory, told_when_out_of_memory
from hfdist.curvature.structural import StructuralDamping, hidden_modules
from hfdist.curvature.verify import Verifier
from hfdist.optim.kept_gain import ADVICE
from hfdist.optim.objective import Operator
from hfdist.optim.options import HFOptions
from hfdist.optim.report import StepReport
from hfdist.optim.step import HFState, hf_step
from hfdist.seeds import mixed
from hfdist.tasks.task import num_examples

logger = logging.getLogger(__name__)

_OPTION_NAMES = tuple(f.name for f in dataclasses.fields(HFOptions))
_GROUP_OPTIONS = {"damping_scale", "weight_decay", "frozen"}
_COMMON_OPTIONS = tuple(name for name in _OPTION_NAMES if name not in _GROUP_OPTIONS)


class HessianFree(torch.optim.Optimizer):
    """Hessian-free optimization (Martens 2010; Martens & Sutskever 2012).

    Args:
        params: Parameters, or parameter groups. A group may set `damping_scale` (its factor on the
            damping), `weight_decay` and `frozen`; every other option is one for all groups.
        curvature_opt: "ggn" or "hessian". This and the next seven are PyTorchHessianFree's arguments, and
            fields of `hfdist.HFOptions`.
        damping: Initial lambda.
        adapt_damping: Whether lambda changes from step to step.
        cg_max_iter: Most CG iterations a step; None: the number of parameters.
        cg_decay_x0: CG starts from this times the last step's solution.
        use_cg_backtracking: Whether to choose among CG's iterates by their loss.
        lr: Step size; the line search's first try.
        use_linesearch: Whether to search along the step.
        verbose: Log the steps at level INFO instead of DEBUG (logger `hfdist.hessian_free`).
        preset: "default" (what the literature does) or "pytorch_hessianfree" (that package's rules; "seed"
            is its first name).
        communicator: Ranks to sum over. By default all ranks of `torch.distributed` where the program
            has initialised it, else this process alone. Each rank evaluates its own shard.
        seed: Seed of the random numbers inside forward passes (dropout); by default torch's.
        **options: Any further field of `hfdist.HFOptions`.

    Attributes:
        report: The `StepReport` of the last step, or None.
        history: The reports of the last 1000 steps.

    The state of a parameter is its warm start `x0`; everything else that resuming needs is in the
    parameter groups, so `state_dict` carries all of it.

    Raises:
        ValueError: An option is unknown or out of range, there is nothing to train, or all parameters are
            of a type shorter than float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        curvature_opt: Literal["ggn", "hessian"] = "ggn",
        damping: float = 1.0,
        adapt_damping: bool = True,
        cg_max_iter: int | None = 250,
        cg_decay_x0: float = 0.95,
        use_cg_backtracking: bool = True,
        lr: float = 1.0,
        use_linesearch: bool = True,
        verbose: bool = False,
        *,
        preset: Literal["default", "pytorch_hessianfree", "seed"] = "default",
        communicator: Communicator | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        unknown = set(options) - set(_OPTION_NAMES)
        if unknown:
            raise ValueError(f"unknown option {sorted(unknown)[0]!r} of HessianFree")
        if damping == 0.0 and adapt_damping:
            warnings.warn("damping is 0: it will not be adapted", stacklevel=2)
            adapt_damping = False
        resolved = HFOptions.with_preset(
            preset,
            curvature_opt=curvature_opt,
            damping=damping,
            adapt_damping=adapt_damping,
            cg_max_iter=cg_max_iter,
            cg_decay_x0=cg_decay_x0,
            use_cg_backtracking=use_cg_backtracking,
            lr=lr,
            use_linesearch=use_linesearch,
            **options,
        )
        self.verbose = verbose
        self.report: StepReport | None = None
        self.history: deque[StepReport] = deque(maxlen=1000)
        self._communicator = communicator
        self._engine: ProductEngine | None = None
        self._leaves_gradient = False
        self._memory = PreconditionerMemory()
        defaults = dataclasses.asdict(resolved) | {
            "damping_scale": 1.0,
            "frozen": False,
            "step": 0,
            "seed": torch.initial_seed() % 2**63 if seed is None else seed,
            "hf_state": HFState(damping=resolved.damping).scalars(),
            "has_x0": False,
            "preconditioner_memory": {},
        }
        super().__init__(params, defaults)
        widest = self._trainable().dtype  # there must be something to train
        if widest.itemsize < 4:
            raise ValueError(
                f"all parameters are of {widest}: steps would be lost in the last of their bits; keep "
                "them in float32, and set product_autocast='bfloat16' for products of that type"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it joins at the next step with a zero warm start.

        Raises:
            ValueError: It sets an option that is one for all groups otherwise than the others.
        """
        given = set(param_group) & set(_COMMON_OPTIONS)
        if self.param_groups:
            first = self.param_groups[0]
            for key in sorted(given | self._given):
                if param_group.get(key, self.defaults[key]) != first[key]:
                    raise _differing(key, first[key], param_group.get(key, self.defaults[key]))
            for key in self.defaults.keys() - _GROUP_OPTIONS:
                param_group.setdefault(key, first[key])
        else:
            self._given: set[str] = given
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_damping_scale(group)
        for p in group["params"]:
            # In the parameter's own dtype, as load_state_dict will cast it.
            self.state[p]["x0"] = torch.zeros_like(p, memory_format=torch.contiguous_format)

    @property
    def damping(self) -> float:
        """Damping of the next step."""
        return self.param_groups[0]["damping"]

    # -- steps -----------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self,
        forward: Callable[[], Any] | None = None,
        grad: Tensor | None = None,
        mvp: Operator | None = None,
        M_func: Operator | None = None,
        test_deterministic: bool = False,
        *,
        closure: Callable[[], Any] | None = None,
    ) -> float:
        """Take one step.

        Args:
            forward: Returns (loss, outputs), with `outputs` the model's outputs (any pytree) for the
                GGN, or None for the Hessian. On several ranks: the loss of the rank's own shard, and
                as a third value the shard's weight (its number of examples) if shards are uneven. A
                closure for torch's optimizers, which returns the loss alone and calls backward(), does,
                too, where the loss is made of torch's losses or squares.
            grad: Gradient [P] over the trainable parameters, instead of the derivative of the loss.
            mvp: Product with the undamped curvature matrix, v [P] -> Bv [P], instead of autograd's.
            M_func: Preconditioner in place of the option's: of CG, approximating the inverse of the damped
                curvature matrix (see `get_preconditioner`); of a Krylov space, the inverse of its metric.
            test_deterministic: Check that two evaluations of loss and product agree; warn otherwise.
            closure: `forward` by torch's name for it, as wrappers of optimizers call it.

        Returns:
            The loss after the step. The whole report is in `self.report`.

        The parameters are unchanged, bit for bit, if the step is rejected or an exception is raised.
        """
        forward = forward or closure
        if forward is None:
            raise TypeError("step() needs a function forward() that returns (loss, outputs)")
        comm = self._comm()
        seed = self._step_seed(comm)
        microbatches = [from_closure(forward, mixed(seed, comm.rank))]
        roles = Roles(gradient=microbatches, curvature=microbatches, loss=microbatches)
        return self._step(roles, "mean", grad, mvp, M_func, test_deterministic)

    def acc_step(
        self,
        model: Callable[[Any], Any],
        loss_func: Callable[[Any, Any], Any],
        loss_datalist: Iterable[tuple[Any, Any]],
        grad_datalist: Iterable[tuple[Any, Any]] | None = None,
        mvp_datalist: Iterable[tuple[Any, Any]] | None = None,
        M_func: Operator | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        test_deterministic: bool = False,
    ) -> float:
        """Take one step on lists of minibatches, accumulated so that memory holds one at a time.

        Args:
            model: The model, or a function; it maps `inputs` to outputs.
            loss_func: Maps (outputs, targets) to a scalar, or to a pair (sum, weight).
            loss_datalist: (inputs, targets) pairs for backtracking and line search.
            grad_datalist: Pairs for the gradient; by default those of the loss.
            mvp_datalist: Pairs for the curvature; by default those of the loss.
            M_func: As in `step`.
            reduction: How `loss_func` reduces over a minibatch ("mean" counts torch's class weights
                and ignored targets rightly).
            test_deterministic: As in `step`.

        Returns:
            The loss after the step.
        """
        comm = self._comm()
        seed = self._step_seed(comm)
        loss_role = self._microbatches(model, loss_func, loss_datalist, reduction, seed, comm)
        gradient_role = curvature_role = loss_role
        if grad_datalist is not None and grad_datalist is not loss_datalist:
            gradient_role = self._microbatches(
                model, loss_func, grad_datalist, reduction, seed, comm
            )
        if mvp_datalist is not None and mvp_datalist is grad_datalist:
            curvature_role = gradient_role
        elif mvp_datalist is not None and mvp_datalist is not loss_datalist:
            curvature_role = self._microbatches(
                model, loss_func, mvp_datalist, reduction, seed, comm
            )
        roles = Roles(gradient=gradient_role, curvature=curvature_role, loss=loss_role)
        how: Literal["mean", "plain_sum"] = "plain_sum" if reduction == "sum" else "mean"
        return self._step(roles, how, None, None, M_func, test_deterministic, model)

    def _step(
        self,
        roles: Roles,
        reduction: Literal["mean", "plain_sum"],
        grad: Tensor | None,
        mvp: Operator | None,
        M_func: Operator | None,
        test_deterministic: bool,
        model: Callable[[Any], Any] | None = None,
    ) -> float:
        options = self.options
        for group in self.param_groups:
            _check_damping_scale(group)
        params = self._trainable()
        if options.damping_metric != "identity":
            raise ValueError("damping_metric needs the model and data of a task: use hfdist.train")
        layout = make_layout(params, self._comm(), options)
        memory = StepMemory(params.device)
        problem = Problem(
            params=params,
            roles=roles,
            comm=self._comm(),
            memory=memory,
            layout=layout,
            curvature_opt=options.curvature_opt,
            reduction=reduction,
            regularisation=self._regularisation(params),
            overrides=Overrides(
                gradient=grad,
                product=mvp,
                preconditioner=make_preconditioner(
                    Context(options=options, damping=self.damping, memory=self._memory)
                )
                if M_func is None
                else lambda _, __: _of_parts(M_func, layout),
                # Steps that are left as gradients move nothing, and parts would be gathered every step.
                secants=None
                if self._leaves_gradient or layout.is_sharded
                else self._memory.secants,
                move=self._leave_gradient if self._leaves_gradient else None,
            ),
            frozen=FixedRandomness(params.device, _module(model)),
            engine=self._product_engine(options),
            autocast=autocast_dtype(options),
            structural=self._structural(model) if options.structural_damping else None,
        )
        if test_deterministic:
            self._test_deterministic(problem)
        before = self._memory.copy()
        try:
            with told_when_out_of_memory(
                memory,
                params,
                options,
                step=self.param_groups[0]["step"],
                world_size=self._comm().world_size,
                in_job=False,
            ):
                report, state = hf_step(problem, self._get_state(params, layout), options)
        except BaseException:
            self._memory = before  # of a step that was not taken
            raise
        self._memory.after(report.work - problem.costs.metric, report.accepted)
        report = dataclasses.replace(report, communication=self._comm().take_counters())
        self._set_state(params, state, layout)
        self.report = report
        self.history.append(report)
        # Steps that are left as gradients are not those that the next loss is of.
        if report.finds_noise and not self._leaves_gradient:
            key = "longer lists, or a larger batch in the closure"
            warnings.warn(ADVICE.format(kept=max(report.kept_gain, 0.0), key=key), stacklevel=3)
        logger.log(
            logging.INFO if self.verbose else logging.DEBUG,
            "step %d: loss %.6g -> %.6g, damping %.3g, alpha %.3g, %d CG iterations (%s), ratio %.3g",
            report.step,
            report.loss,
            report.final_loss,
            report.damping,
            report.alpha,
            report.cg_iterations,
            report.stop,
            report.reduction_ratio,
        )
        return report.final_loss

    def _structural(self, model: Any) -> StructuralDamping:
        """The term of a model that names its hidden units; `step` does not know the model."""
        named = getattr(model, "hidden_units", list)
        return StructuralDamping(
            modules=hidden_modules(named()),
            mu=self.options.structural_damping,
            share=self.options.structural_examples,
        )

    @contextmanager
    def steps_as_gradients(self) -> Iterator[None]:
        """Steps inside the block do not move the parameters: they leave minus the step in `.grad`, zeros
        where it was rejected. See `newton_gradient`."""
        before, self._leaves_gradient = self._leaves_gradient, True
        for p in self._trainable().tensors:
            p.grad = torch.zeros_like(p)
        try:
            yield
        finally:
            self._leaves_gradient = before

    def _leave_gradient(self, alpha: float, step: Tensor) -> None:
        params = self._trainable()
        for p, piece in zip(params.tensors, params.views(step)):
            p.grad = piece.mul(-alpha).to(p.dtype)

    # -- what the seed also has ------------------------------------------------------------------

    def get_preconditioner(
        self,
        model: nn.Module,
        loss_func: Callable[[Any, Any], Any],
        inputs: Any,
        targets: Any,
        reduction: Literal["mean", "sum"],
        exponent: float | None = None,
        use_backpack: bool = True,
    ) -> DiagonalPreconditioner:
        """Empirical Fisher diagonal preconditioner at the current damping, [1] sec. 4.7.

        Args:
            model: As in `acc_step`.
            loss_func: As in `acc_step`.
            inputs: Of one minibatch.
            targets: Of the same minibatch.
            reduction: As in `acc_step`.
            exponent: By default `preconditioner_exponent` (0.75).
            use_backpack: Use BackPACK where it supports the model; torch.func elsewhere.

        Returns:
            v [P] -> v / (diagonal + damping + weight decay)^exponent, for `M_func`.
        """
        params = self._trainable()
        diagonal = empirical_fisher_diagonal(
            model, loss_func, inputs, targets, reduction, use_backpack=use_backpack, params=params
        )
        options = self.options
        return DiagonalPreconditioner(
            diagonal.add_(self._regularisation(params).weight_decay),
            self._damping_diagonal(params),
            options.preconditioner_exponent if exponent is None else exponent,
        )

    def test_reduction(
        self,
        model: nn.Module,
        loss_func: Callable[[Any, Any], Any],
        datalist: Iterable[tuple[Any, Any]],
        reduction: Literal["mean", "sum"],
    ) -> None:
        """Check that accumulating over `datalist` gives what one minibatch of all of it gives.

        Raises:
            RuntimeError: Loss, gradient or product differ: `reduction` does not describe `loss_func`.
            ValueError: `datalist` has fewer than two entries.
        """
        pairs = list(datalist)
        if len(pairs) < 2:
            raise ValueError("test_reduction needs at least two minibatches")
        whole = [_concatenate(pairs)]
        params = self._trainable()
        v = torch.linspace(-1.0, 1.0, params.numel, dtype=params.dtype, device=params.device)
        results = []
        for data in (pairs, whole):
            role = self._microbatches(model, loss_func, data, reduction, 0, self._comm())
            problem = Problem(
                params=params,
                roles=Roles(gradient=role, curvature=role, loss=role),
                curvature_opt=self.options.curvature_opt,
                reduction="plain_sum" if reduction == "sum" else "mean",
                frozen=FixedRandomness(params.device, _module(model)),
            )
            loss, g = problem.loss_and_gradient()
            results.append((torch.tensor(loss), g, problem.curvature()(v)))
        for what, parts, reference in zip(("loss", "gradient", "product"), *results):
            if not torch.allclose(parts, reference, rtol=1e-4, atol=1e-6):
                raise RuntimeError(
                    f"the {what} over the minibatches is not that of the whole batch: "
                    f"reduction={reduction!r} does not describe the loss function"
                )

    # -- state -----------------------------------------------------------------------------------

    @property
    def options(self) -> HFOptions:
        """The rules in force: those in the first parameter group."""
        first, *others = self.param_groups
        for group in others:
            for key in _COMMON_OPTIONS:
                if group[key] != first[key]:
                    raise _differing(key, first[key], group[key])
        return HFOptions(**{name: first[name] for name in _OPTION_NAMES})

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the communicator, which belongs to this process."""
        own = ("verbose", "report", "history", "_given")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._communicator, self._engine, self._leaves_gradient = None, None, False
        super().__setstate__(state)
        self._load_memory()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`: options, damping, warm start and counters are all in it."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        # torch copies groups in depth, which tensors of some devices do not bear, and which these do not
        # need: a step replaces them.
        memory = groups[0].pop("preconditioner_memory", {}) if groups else {}
        super().load_state_dict({**state_dict, "param_groups": groups})
        self.param_groups[0]["preconditioner_memory"] = memory
        self._load_memory()
        for group in self.param_groups:  # of a version that had not all of today's options
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for p in (p for group in self.param_groups for p in group["params"]):
            if "x0" not in self.state[p]:
                self.state[p]["x0"] = torch.zeros_like(p, memory_format=torch.contiguous_format)

    def _load_memory(self) -> None:
        self._memory = PreconditionerMemory()
        self._memory.load_state_dict(self.param_groups[0].get("preconditioner_memory", {}))

    def _trainable(self) -> ParameterVector:
        return ParameterVector(
            p
            for group in self.param_groups
            if not group["frozen"]
            for p in group["params"]
            if p.requires_grad
        )

    def _groups_of(self, params: ParameterVector) -> list[dict[str, Any]]:
        """The group of each trainable tensor."""
        owner = {p: group for group in self.param_groups for p in group["params"]}
        return [owner[p] for p in params.tensors]

    def _regularisation(self, params: ParameterVector) -> Regularisation:
        groups = self._groups_of(params)

        def of_groups(key: str) -> float | Tensor:
            values = [float(group[key]) for group in groups]
            if all(v == values[0] for v in values) and (key != "damping_scale" or values[0] == 1):
                return values[0]
            return params.spread(values)

        scale = of_groups("damping_scale")
        return Regularisation(
            weight_decay=of_groups("weight_decay"),
            damping_scale=scale if isinstance(scale, Tensor) else None,
        )

    def _damping_diagonal(self, params: ParameterVector) -> float | Tensor:
        scale = self._regularisation(params).damping_scale
        return self.damping if scale is None else self.damping * scale

    def _get_state(self, params: ParameterVector, layout: Layout) -> HFState:
        first = self.param_groups[0]
        x0 = None
        if first["has_x0"]:
            x0 = layout.part(params.flatten([self.state[p]["x0"] for p in params.tensors]))
        return HFState.restored({**first["hf_state"], "damping": first["damping"]}, x0)

    def _set_state(self, params: ParameterVector, state: HFState, layout: Layout) -> None:
        if state.x0 is None:
            for p in params.tensors:  # without a vector of zeros: the parameters have moved by now
                self.state[p]["x0"].zero_()
        else:
            for p, piece in zip(params.tensors, params.views(layout.whole(state.x0))):
                self.state[p]["x0"].copy_(piece)
        kept = self._memory.state_dict(layout.whole)
        for group in self.param_groups:
            group["damping"] = state.damping
            group["step"] = state.step
            group["hf_state"] = state.scalars()
            group["has_x0"] = state.x0 is not None
            group["preconditioner_memory"] = kept

    # -- helpers ---------------------------------------------------------------------------------

    def _product_engine(self, options: HFOptions) -> ProductEngine:
        """The same for all steps, while its options are."""
        engine = self._engine
        if (
            engine is None
            or engine.requested != options.product_engine
            or engine.verifier.mode != options.verify
        ):
            engine = ProductEngine(
                requested=options.product_engine, verifier=Verifier(mode=options.verify)
            )
        engine.memory_budget = options.memory_budget
        engine.captures = options.capture_products
        engine.reserved = reserved_bytes(self._trainable(), options, self._comm().world_size)
        self._engine = engine
        return engine

    def _comm(self) -> Communicator:
        if self._communicator is None:
            self._communicator = current_communicator(self._trainable().device)
        return self._communicator

    def _step_seed(self, comm: Communicator) -> int:
        first = self.param_groups[0]
        return mixed(comm.broadcast_object(first["seed"]), first["step"])

    def _microbatches(
        self,
        model: Callable[[Any], Any],
        loss_func: Callable[[Any, Any], Any],
        data: Iterable[tuple[Any, Any]],
        reduction: str,
        seed: int,
        comm: Communicator,
    ) -> Sequence[Microbatch]:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: it must be 'mean' or 'sum'")
        device = self._trainable().device
        pairs = [
            tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, tuple(pair))
            for pair in data
        ]
        sizes = [num_examples(pair) for pair in pairs]
        first = 0  # number of this rank's first example
        if self.param_groups[0]["preconditioner"] != "none":
            first = sum(comm.all_gather_object(sum(sizes))[: comm.rank])

        def microbatch(number: int, pair: Any, seeds: Tensor) -> Microbatch:
            inputs, targets = pair

            def loss_of(outputs: Any) -> tuple[Tensor, float | Tensor]:
                loss = loss_func(outputs, targets)
                if reduction == "mean" and isinstance(loss, Tensor):
                    weight = mean_weight(loss_func, (inputs, targets))
                    loss = (loss * weight, weight)
                return as_sum(loss, num_examples((inputs, targets)), reduction, "loss_func")

            def part(share: float) -> Microbatch | None:
                n, kept = len(seeds), chosen(seeds, share)
                if len(kept) == n or share >= 1.0 or has_batch_statistics(model):
                    return whole
                if not len(kept):
                    return None
                return microbatch(number, rows_of(pair, n, kept), seeds[kept])

            whole = dataclasses.replace(
                from_parts(
                    lambda: model(inputs), loss_of, mixed(seed, comm.rank, number), "loss_func"
                ),
                example_seeds=seeds,
                part=part,
                part_may_fail=True,
            )
            return whole

        found = []
        for number, (pair, n) in enumerate(zip(pairs, sizes)):
            # As `step` draws for the examples of one rank's outputs.
            seeds = example_seeds(mixed(seed, 0), torch.arange(first, first + n))
            found.append(microbatch(number, pair, seeds))
            first += n
        if not found and comm.world_size == 1:  # of several ranks, one may have nothing
            raise ValueError("a list of minibatches is empty: give at least one (inputs, targets)")
        return found

    def _test_deterministic(self, problem: Problem) -> None:
        """Two evaluations of loss and product must agree; both are made with frozen randomness, so
        what differs is state that the forward pass keeps, or nondeterministic kernels."""
        (first, g), (second, _) = problem.loss_and_gradient(), problem.loss_and_gradient()
        agree = torch.allclose(torch.tensor(first), torch.tensor(second), equal_nan=True)
        B = problem.curvature()
        v = torch.ones_like(g)
        agree &= torch.allclose(B(v).clone(), B(v), equal_nan=True)
        if not agree:
            warnings.warn(
                "two evaluations of the same loss or product differ: the step is not trustworthy. "
                "Does forward() draw new data or keep state between calls?",
                stacklevel=3,
            )


def newton_gradient(optimizer: HessianFree, *args: Any, **kwargs: Any) -> float:
    """Leave the Newton direction in the parameters' `.grad`, for any torch optimizer to follow.

    SGD with a learning rate of 1 then takes the Hessian-free step; with momentum, with a schedule, or with
    Adam, it is their rule on a preconditioned gradient. With `solver="metric"` it costs no products: the
    cheap mode for small batches.

        newton = HessianFree(model.parameters(), solver="metric")
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for inputs, targets in batches:
            newton_gradient(newton, model, loss_function, [(inputs, targets)])
            sgd.step()

    Args:
        optimizer: Its rules find the direction; its damping follows as if its steps were taken.
        args, kwargs: As for `HessianFree.acc_step`; or a function for `HessianFree.step`, with that method's
            other arguments by keyword.

    Returns:
        The loss where the parameters are. `optimizer.report` is of the whole step; where that was rejected,
        the gradient is zero.
    """
    take = optimizer.acc_step if len(args) > 1 or "loss_func" in kwargs else optimizer.step
    with optimizer.steps_as_gradients():
        take(*args, **kwargs)
    assert optimizer.report is not None
    return optimizer.report.loss


def _module(model: Any) -> nn.Module | None:
    """None where the modules are to be found while they run."""
    return model if isinstance(model, nn.Module) else None


def _check_damping_scale(group: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: It is negative; or zero, where it scales the metric of a Krylov space.
    """
    scale, solver = group["damping_scale"], group["solver"]
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"damping_scale is {scale}: it must be at least 0, and finite")
    if scale == 0.0 and solver in ("auto", "krylov", "metric") and not group["frozen"]:
        raise ValueError(
            f"damping_scale is 0: solver={solver!r} measures steps by it, so it must be above 0 there; give "
            "a small factor, or choose solver='cg'"
        )


def _differing(key: str, first: Any, other: Any) -> ValueError:
    return ValueError(
        f"{key} is {first} in one parameter group and {other} in another: it is one for all groups; only "
        f"{', '.join(sorted(_GROUP_OPTIONS))} may differ"
    )


def _of_parts(M: Operator, layout: Layout) -> Operator:
    """A preconditioner of whole vectors as one of this rank's parts."""
    return lambda v: layout.part(M(layout.whole(v)))


def _concatenate(pairs: list[tuple[Any, Any]]) -> Any:
    """One minibatch of all the pairs' examples."""
    return tree_map(
        lambda *ts: torch.cat(ts) if isinstance(ts[0], Tensor) else ts[0], pairs[0], *pairs[1:]
    )
