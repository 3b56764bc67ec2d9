"""Hessian-free beside torch's optimizers: one task, one model, one batch, one budget of seconds.

Every contender starts from the same parameters and sees the same batch; each of the others gets its best
setting of a small grid, which is more than the Hessian-free step gets. Seconds count training alone:
the losses of the curves are evaluated off the clock.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hfdist.comm import SerialCommunicator
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import as_sum, from_task
from hfdist.curvature.objective import Overrides, Problem, Regularisation, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.preconditioners import Context, make_preconditioner
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import MicrobatchPlan
from hfdist.data.stream import is_stream
from hfdist.optim.options import HFOptions
from hfdist.optim.step import HFState, hf_step
from hfdist.tasks.task import Task, num_examples
from hfdist.training.evaluation import evaluate

GRADIENTS_PER_PRODUCT = 4 / 3
"""Matrix products of a Gauss-Newton product on kept activations, 4 a layer, in those of a gradient, 3."""
GRADIENTS_PER_LOSS = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a contender stands."""

    seconds: float
    gradients: float
    """Work so far in gradients of the batch."""
    updates: int
    loss: float
    """Loss on the batch, regularisation included."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One optimizer with one setting, and what became of it."""

    name: str
    setting: str
    curve: list[Moment]
    evaluation: dict[str, float]
    """Loss and metrics on the evaluation data, at the end."""

    @property
    def loss(self) -> float:
        """Last loss; infinite if it diverged."""
        last = self.curve[-1].loss
        return last if math.isfinite(last) else math.inf


class Arena:
    """The common problem: model, batch, loss, clock.

    Args:
        task: Its training data is the batch, all of it or the first `examples`.
        seconds: Budget of every contender.
        weight_decay: L2 coefficient, the same for all.
        examples: Size of the batch; None: all training data.
        seed: Of the model's initialisation.
        clock: "wall", or "cpu": the seconds that this process had a core, of all its threads together,
            which others on a busy machine do not change.
    """

    def __init__(
        self,
        task: Task,
        *,
        seconds: float,
        weight_decay: float = 0.0,
        examples: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        clock: Literal["wall", "cpu"] = "wall",
    ) -> None:
        self._now = time.process_time if clock == "cpu" else time.perf_counter
        self.task, self.budget, self.weight_decay, self._seed = task, seconds, weight_decay, seed
        self._comm = SerialCommunicator(device)
        data = task.train_data()
        if data is None:
            raise ValueError(f"{type(task).__name__} has no data: nothing to compare on")
        if is_stream(data):
            raise ValueError(f"{type(task).__name__}.train_data() is a stream: give it a length")
        n = min(examples or len(data), len(data))  # type: ignore[arg-type]
        loader = BatchLoader(task, data, self._comm.device, torch.float32)
        self.batch = loader.load(MicrobatchPlan(number=0, indices=torch.arange(n)))
        loader.close()
        self.num_examples = num_examples(self.batch)

    def model(self) -> nn.Module:
        """A fresh model, the same every time."""
        torch.manual_seed(self._seed)
        return self.task.model().to(self._comm.device)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean loss with the L2 term, a scalar with its graph."""
        outputs = self.task.forward(model, self.batch)
        reduction = self.task.loss_reduction
        total, weight = as_sum(
            self.task.loss(outputs, self.batch), self.num_examples, reduction, "loss"
        )
        mean = total / weight if reduction == "mean" else total
        if self.weight_decay:
            squares = [p.square().sum() for p in model.parameters() if p.requires_grad]
            mean = mean + 0.5 * self.weight_decay * torch.stack(squares).sum()
        return mean

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and metrics on the evaluation data, if the task has some."""
        data = self.task.eval_data()
        if data is None:
            return {}
        loader = BatchLoader(self.task, data, self._comm.device, torch.float32)
        try:
            return evaluate(self.task, model, loader, len(data), self._comm, 512)  # type: ignore[arg-type]
        finally:
            loader.close()

    def run(
        self, name: str, setting: str, model: nn.Module, updates: Iterator[float], points: int = 40
    ) -> Contender:
        """Draw updates until the budget is spent; each gives its work in gradients."""
        clock, work, count = 0.0, 0.0, 0
        curve = [self._moment(model, clock, work, count)]
        looked = 0.0
        while clock < self.budget:
            start = self._now()
            done = next(updates, None)
            if done is None:
                break
            clock += self._now() - start
            work += done
            count += 1
            if clock - looked >= self.budget / points or clock >= self.budget:
                looked = clock
                curve.append(self._moment(model, clock, work, count))
                if not math.isfinite(curve[-1].loss):
                    break
        if curve[-1].updates != count:
            curve.append(self._moment(model, clock, work, count))
        return Contender(name=name, setting=setting, curve=curve, evaluation=self.evaluate(model))

    def _moment(self, model: nn.Module, clock: float, work: float, count: int) -> Moment:
        with torch.no_grad():
            loss = float(self.loss(model))
        return Moment(seconds=clock, gradients=work, updates=count, loss=loss)


# -- contenders --------------------------------------------------------------------------------------


def hessian_free(arena: Arena, options: HFOptions) -> Contender:
    """The step of this package; the L2 coefficient is the arena's."""
    model = arena.model()
    return arena.run(
        "Hessian-free", f"damping {options.damping:g}", model, _hf_updates(arena, model, options)
    )


def _hf_updates(arena: Arena, model: nn.Module, options: HFOptions) -> Iterator[float]:
    params = ParameterVector(p for p in model.parameters() if p.requires_grad)
    state = HFState(damping=options.damping)
    rules = replace(options, weight_decay=arena.weight_decay)
    for step in itertools.count():
        role = [from_task(arena.task, model, arena.batch, seed=step)]
        context = Context(
            task=arena.task, model=model, gradient=[(role[0], arena.batch)], options=rules
        )
        problem = Problem(
            params=params,
            roles=Roles(gradient=role, curvature=role, loss=role),
            curvature_opt=options.curvature_opt,
            reduction=arena.task.loss_reduction,
            regularisation=Regularisation(weight_decay=arena.weight_decay),
            frozen=FixedRandomness(params.device, model),
            overrides=Overrides(preconditioner=make_preconditioner(context)),
        )
        report, state = hf_step(problem, state, rules)
        yield (
            1
            + GRADIENTS_PER_PRODUCT * report.num_products
            + GRADIENTS_PER_LOSS * report.num_loss_evaluations
            + (options.preconditioner == "empirical_fisher")
        )


Make = Callable[[nn.Module], Sequence[torch.optim.Optimizer]]


def first_order(arena: Arena, name: str, setting: str, make: Make) -> Contender:
    """Optimizers that take one gradient an update (several where parameters are divided)."""
    model = arena.model()
    optimizers = make(model)

    def updates() -> Iterator[float]:
        while True:
            for optimizer in optimizers:
                optimizer.zero_grad()
            arena.loss(model).backward()
            for optimizer in optimizers:
                optimizer.step()
            yield 1.0

    return arena.run(name, setting, model, updates())


def lbfgs(arena: Arena, history: int, max_iter: int = 20) -> Contender:
    """torch.optim.LBFGS with its strong Wolfe line search."""
    model = arena.model()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        lr=1.0,
        max_iter=max_iter,
        history_size=history,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )

    def updates() -> Iterator[float]:
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = arena.loss(model)
            loss.backward()
            return loss

        while True:
            calls = 0
            optimizer.step(closure)
            yield float(calls)

    return arena.run("L-BFGS", f"history {history}", model, updates())


def _muon(lr: float) -> Make:
    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0))
        if others:
            optimizers.append(torch.optim.Adam(others, lr=lr))
        return optimizers

    return make


def rivals() -> dict[str, list[Callable[[Arena], Contender]]]:
    """The others, each with its grid; SOAP where the package pytorch-optimizer is installed."""
    found: dict[str, list[Callable[[Arena], Contender]]] = {"Adam": [], "SGD": [], "L-BFGS": []}
    for lr in (1e-3, 3e-3, 1e-2, 3e-2):
        found["Adam"].append(
            lambda arena, lr=lr: first_order(  # type: ignore[misc]
                arena, "Adam", f"lr {lr:g}", lambda m: [torch.optim.Adam(m.parameters(), lr=lr)]
            )
        )
    for lr in (1e-2, 1e-1, 1.0):
        found["SGD"].append(
            lambda arena, lr=lr: first_order(  # type: ignore[misc]
                arena,
                "SGD",
                f"lr {lr:g}, momentum 0.9",
                lambda m: [torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9, nesterov=True)],
            )
        )
    for history in (10, 100):
        found["L-BFGS"].append(lambda arena, history=history: lbfgs(arena, history))  # type: ignore[misc]
    if hasattr(torch.optim, "Muon"):
        found["Muon"] = [
            lambda arena, lr=lr: first_order(arena, "Muon", f"lr {lr:g}", _muon(lr))  # type: ignore[misc]
            for lr in (1e-3, 1e-2, 3e-2)
        ]
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        return found
    found["SOAP"] = [
        lambda arena, lr=lr: first_order(  # type: ignore[misc]
            arena, "SOAP", f"lr {lr:g}", lambda m: [SOAP(m.parameters(), lr=lr, weight_decay=0.0)]
        )
        for lr in (1e-3, 3e-3, 1e-2)
    ]
    return found


def compare(
    arena: Arena, options: HFOptions, names: Sequence[str] | None = None
) -> list[Contender]:
    """Run them all; of each rival its best setting.

    Args:
        arena: The common problem.
        options: Rules of the Hessian-free step.
        names: Rivals; None: all there are.

    Returns:
        Hessian-free first, then the rivals by their last loss.
    """
    known = rivals()
    unknown = set(names or ()) - set(known)
    if unknown:
        raise ValueError(
            f"unknown optimizer {sorted(unknown)[0]!r}: choose from {', '.join(known)}"
        )
    best = []
    for name in names or known:
        tried = [contend(arena) for contend in known[name]]
        best.append(min(tried, key=lambda contender: contender.loss))
    best.sort(key=lambda contender: contender.loss)
    return [hessian_free(arena, options), *best]


def to_rows(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """A table: one row a contender, its last moment and its evaluation."""
    return [
        {
            "optimizer": c.name,
            "setting": c.setting,
            **asdict(c.curve[-1]),
            **{f"eval_{key}": value for key, value in c.evaluation.items()},
        }
        for c in contenders
    ]


def plot(contenders: Sequence[Contender], path: Path, title: str) -> Path:
    """Loss against seconds, work and updates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axis, key, label in zip(
        axes,
        ("seconds", "gradients", "updates"),
        ("seconds", "gradients of the batch", "updates"),
    ):
        for c in contenders:
            x = [getattr(moment, key) for moment in c.curve]
            width = 2.2 if c.name == "Hessian-free" else 1.3
            axis.plot(
                x, [m.loss for m in c.curve], label=f"{c.name} ({c.setting})", linewidth=width
            )
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        if key != "seconds":
            axis.set_xscale("symlog")
            axis.set_xlim(left=0)
    axes[0].set_ylabel("training loss")
    axes[-1].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
