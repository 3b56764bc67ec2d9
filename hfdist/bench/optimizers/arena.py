"""The common problem of all contenders: model, whole batch, loss and clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfdist.bench.optimizers.curve import Curve, Update
from hfdist.config.job import RunConfig
from hfdist.curvature.microbatch import as_sum
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import StepPlan, plan_step
from hfdist.data.points import plan_points
from hfdist.data.stream import is_stream
from hfdist.devices import resolve
from hfdist.errors import ConfigError
from hfdist.tasks.task import Batch, num_examples
from hfdist.training.worker import build, term_sizes


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Where a contender ends: at whichever comes first."""

    gradients: float
    """Work in gradient-equivalents."""
    seconds: float
    """Training time."""

    def spent(self, curve: Curve) -> float:
        """The part that is used up."""
        return max(curve.gradients[-1] / self.gradients, curve.seconds[-1] / self.seconds)


class Arena:
    """A job's model and its training data as one batch, cut into the job's microbatches.

    Args:
        config: The job; its optimizer's options do not matter but for `weight_decay`.

    Raises:
        ConfigError: Its task has no data, or its steps see a part of them only.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = resolve(config.device, local_rank=0)
        self.task, _ = build(config, self.device)
        self.weight_decay = config.optim.weight_decay
        data = self.task.train_data()
        if data is None:
            raise ConfigError(f"{config.task} has no data: there is no batch to compare on")
        if is_stream(data):
            raise ConfigError(
                f"{config.task} trains on a stream: give its data a length to compare on"
            )
        self.num_examples = len(data)  # type: ignore[arg-type]
        if (config.batches.gradient or self.num_examples) < self.num_examples:
            raise ConfigError(
                f"batches.gradient is {config.batches.gradient}: optimizers are compared on whole batches of "
                f"{self.num_examples} examples; leave it out, or give the task fewer"
            )
        self._terms = term_sizes(data)
        self._redraws = any(term.every_step for term in self._terms or ())
        self._loader = BatchLoader(self.task, data, self.device, getattr(torch, config.dtype))
        self.batches: list[Batch] = []
        self._load(0)
        self._known_weight = 1.0 if self.task.loss_reduction == "sum" else None

    def _load(self, step: int) -> None:
        plan = self._plan(step)
        self.batches = [self._loader.load(part) for part in plan.gradient.microbatches]

    def _plan(self, step: int) -> StepPlan:
        config = self.config
        if self._terms is not None:
            return plan_points(config.batches, self._terms, step=step, rank=0, world_size=1)
        return plan_step(
            config.batches,
            num_examples=self.num_examples,
            seed=config.seed,
            step=step,
            rank=0,
            world_size=1,
        )

    def begin(self, step: int) -> None:
        """An update begins: the points of terms that are drawn anew in every step are those of a job's step
        of that number."""
        if self._redraws:
            self._load(step)

    def model(self) -> nn.Module:
        """A fresh model, the same every time, in training mode."""
        return build(self.config, self.device)[1].train()

    def gradient(self, model: nn.Module) -> float:
        """Leave the gradient of the loss in the parameters' `grad`; returns the loss."""
        model.zero_grad()
        loss = 0.0
        for batch in self.batches:
            mean = self._sums(model, batch)[0] / self._weight(model)
            mean.backward()
            loss += float(mean.detach())
        if self.weight_decay:
            for p in model.parameters():
                if p.requires_grad and p.grad is not None:
                    p.grad.add_(p.detach(), alpha=self.weight_decay)
        return loss + self._penalty(model)

    def loss(self, model: nn.Module) -> float:
        """The loss alone."""
        with torch.no_grad():
            total = sum(float(self._sums(model, batch)[0]) for batch in self.batches)
        return total / self._weight(model) + self._penalty(model)

    def _weight(self, model: nn.Module) -> float:
        """What the sum of the losses is divided by."""
        if self._known_weight is None:
            with torch.no_grad():
                weights = [float(self._sums(model, batch)[1]) for batch in self.batches]
            self._known_weight = sum(weights)
        return self._known_weight

    def _sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float | Tensor]:
        outputs = self.task.forward(model, batch)
        total, weight = as_sum(
            self.task.loss(outputs, batch), num_examples(batch), self.task.loss_reduction, "loss"
        )
        return total, weight

    def _penalty(self, model: nn.Module) -> float:
        if not self.weight_decay:
            return 0.0
        squares = [p.detach().square().sum() for p in model.parameters() if p.requires_grad]
        return 0.5 * self.weight_decay * float(torch.stack(squares).sum())


@dataclass(kw_only=True)
class Run:
    """A contender on its way."""

    curve: Curve
    model: nn.Module
    updates: Iterator[Update]


def race(
    arena: Arena,
    runs: Sequence[Run],
    budget: Budget,
    watch: Callable[[Run], None] = lambda run: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Curve]:
    """Let them spend the budget, the one that has spent least next; losses at the end are off the clock.

    Args:
        arena, runs, budget: The problem, who takes part, and until when.
        watch: Told of a contender after each of its updates; off the clock.
        clock: Seconds.
    """
    live = list(runs)
    for run in runs:
        run.curve.is_interleaved = len(runs) > 1
    while live:
        run = min(live, key=lambda run: budget.spent(run.curve))
        start = clock()
        update = next(run.updates, None)
        if update is not None:
            run.curve.add(update, clock() - start)
            watch(run)
        if update is None or run.curve.has_diverged or budget.spent(run.curve) >= 1.0:
            run.curve.losses.append(arena.loss(run.model))
            run.updates = iter(())
            live.remove(run)
    return [run.curve for run in runs]
