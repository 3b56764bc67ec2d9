"""The others: public implementations of their optimizers, each with a grid of settings.

Work is counted in passes. A gradient is 1. Where an optimizer needs second moments of activations and output
gradients (K-FAC), they are two matrix products a layer beside the six of a gradient's three passes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.bench.optimizers.arena import Arena, Run
from hfdist.bench.optimizers.curve import Curve, Update
from hfdist.errors import ConfigError

WARM_UP = 0.05
"""Part of the budget in which a scheduled learning rate rises; then it falls to 0 as half a cosine."""
GRADIENTS_PER_STATISTIC = 2 / 6


Start = Callable[[Arena, nn.Module, Callable[[], float]], Iterator[Update]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One place on a rival's grid."""

    text: str
    start: Start
    """(arena, model, part of the budget that is spent) -> its updates."""


def enter(arena: Arena, optimizer: str, setting: Setting, spent: Callable[[Curve], float]) -> Run:
    """A contender at the start."""
    model = arena.model()
    curve = Curve(optimizer=optimizer, setting=setting.text, seed=arena.config.seed)
    updates = setting.start(arena, model, lambda: spent(curve))
    return Run(curve=curve, model=model, updates=_on_their_points(arena, updates))


def _on_their_points(arena: Arena, updates: Iterator[Update]) -> Iterator[Update]:
    for step in itertools.count():
        arena.begin(step)
        update = next(updates, None)
        if update is None:
            return
        yield update


def rivals(
    arena: Arena,
    names: Sequence[str] | None = None,
    grids: Mapping[str, Grid] | None = None,
) -> dict[str, list[Setting]]:
    """Their grids; of K-FAC only where it knows all of the model's layers.

    Args:
        arena: The problem.
        names: Which; None: all that can run.
        grids: To choose from; None: those of this file.

    Raises:
        ConfigError: An unknown name, or the package of a rival is not installed.
    """
    grids = _GRIDS if grids is None else grids
    unknown = set(names or ()) - set(grids)
    if unknown:
        raise ConfigError(
            f"unknown optimizer {sorted(unknown)[0]!r}: choose from {', '.join(grids)}"
        )
    found = {name: grids[name](arena) for name in names or grids}
    return {name: grid for name, grid in found.items() if grid}


# -- grids -------------------------------------------------------------------------------------------

Grid = Callable[[Arena], list[Setting]]
_Make = Callable[[nn.Module], torch.optim.Optimizer]


def adam(lr: float) -> _Make:
    """torch's, with its defaults."""
    return lambda model: torch.optim.Adam(model.parameters(), lr=lr)


def soap(lr: float) -> _Make:
    """Every 10th step refreshes the eigenvectors, as published [Vyas et al. 2024].

    Raises:
        ConfigError: Its package is not installed.
    """
    optimizers = _import("pytorch_optimizer")
    return lambda model: optimizers.SOAP(_trainable(model), lr=lr, weight_decay=0.0)


def _adam(arena: Arena) -> list[Setting]:
    return scheduled(adam, (1e-3, 3e-3, 1e-2, 3e-2))


def _sgd(arena: Arena) -> list[Setting]:
    def make(lr: float) -> _Make:
        return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)

    return scheduled(make, (1e-2, 1e-1, 1.0))


def _soap(arena: Arena) -> list[Setting]:
    return scheduled(soap, (3e-3, 1e-2, 3e-2, 1e-1))


def _muon(arena: Arena) -> list[Setting]:
    """Adam for vectors and embeddings; one learning rate for both, since updates have Adam's size."""
    optimizers = _import("pytorch_optimizer")

    def make(lr: float) -> _Make:
        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
            trained = _trainable(model)
            matrices = [p for p in trained if p.ndim >= 2 and id(p) not in embedded]
            others = [p for p in trained if p.ndim < 2 or id(p) in embedded]
            groups = [
                {"params": matrices, "lr": lr, "use_muon": True, "use_adjusted_lr": True},
                {"params": others, "lr": lr, "use_muon": False},
            ]
            return optimizers.Muon([group for group in groups if group["params"]])

        return optimizer

    return scheduled(make, (1e-2, 3e-2, 1e-1))


def lbfgs(arena: Arena) -> list[Setting]:
    """torch's, with two lengths of its history."""
    return [
        Setting(text=f"history {history}", start=partial(lbfgs_updates, history=history))
        for history in (10, 100)
    ]


def _kfac(arena: Arena) -> list[Setting]:
    """KFAC without inverses [Lin et al. 2023], on the empirical Fisher; its statistics every step."""
    singd = _import("singd.optim.optimizer")
    layers = [m for m in arena.model().modules() if any(True for _ in m.parameters(recurse=False))]
    if len(arena.batches) > 1 or not all(isinstance(m, (nn.Linear, nn.Conv2d)) for m in layers):
        return []

    def make(lr: float, damping: float, lr_cov: float) -> _Make:
        return lambda model: singd.SINGD(
            model,
            lr=lr,
            momentum=0.9,
            damping=damping,
            lr_cov=lr_cov,
            T=1,
            alpha1=0.0,  # K-FAC has no momentum in its statistics' inverses
            kfac_like=True,
            normalize_lr_cov=True,
            loss_average=None if arena.task.loss_reduction == "sum" else "batch",
        )

    work = 1.0 + GRADIENTS_PER_STATISTIC
    return [
        Setting(
            text=f"lr {lr:g}, damping {damping:g}, covariances {lr_cov:g}",
            start=first_order(make(lr, damping, lr_cov), schedule=False, work=work),
        )
        for lr, damping, lr_cov in itertools.product((1e-2, 3e-2, 1e-1), (1e-3, 1e-1), (0.05,))
    ]


_GRIDS: dict[str, Grid] = {
    "SOAP": _soap,
    "Muon": _muon,
    "Adam": _adam,
    "L-BFGS": lbfgs,
    "K-FAC": _kfac,
    "SGD": _sgd,
}


def _import(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module.partition('.')[0]} is not installed: install hfdist with the extra `bench`, or "
            "name other rivals"
        ) from error


def _trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


# -- updates -----------------------------------------------------------------------------------------


def scheduled(
    make: Callable[[float], _Make],
    rates: Sequence[float],
    schedules: Sequence[bool] = (False, True),
) -> list[Setting]:
    """Every learning rate, constant, and with warm-up and cosine over the budget."""
    return [
        Setting(
            text=f"lr {lr:g}" + (", cosine" if schedule else ""),
            start=first_order(make(lr), schedule=schedule),
        )
        for lr in rates
        for schedule in schedules
    ]


def first_order(make: _Make, *, schedule: bool, work: float = 1.0) -> Start:
    """One gradient an update."""

    def start(arena: Arena, model: nn.Module, spent: Callable[[], float]) -> Iterator[Update]:
        optimizer = make(model)
        rates = [group["lr"] for group in optimizer.param_groups]
        while True:
            if schedule:
                for group, lr in zip(optimizer.param_groups, rates):
                    group["lr"] = lr * _cosine(spent())
            loss = arena.gradient(model)
            optimizer.step()
            yield Update(loss=loss, work=work)

    return start


def _cosine(spent: float) -> float:
    """Factor on the learning rate."""
    if spent < WARM_UP:
        return (spent + 0.01) / (WARM_UP + 0.01)
    return 0.5 * (1.0 + math.cos(math.pi * min((spent - WARM_UP) / (1.0 - WARM_UP), 1.0)))


_LBFGS_AT_ONCE = 10
"""Every call of its step evaluates the gradient once more, at its start."""


def lbfgs_updates(
    arena: Arena, model: nn.Module, spent: Callable[[], float], history: int
) -> Iterator[Update]:
    """torch's L-BFGS with its strong Wolfe line search; ten iterations at once."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        lr=1.0,
        max_iter=_LBFGS_AT_ONCE,
        history_size=history,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )
    losses: list[float] = []

    def closure() -> Tensor:
        losses.append(arena.gradient(model))
        return torch.tensor(losses[-1], dtype=torch.float64)

    while True:
        losses.clear()
        optimizer.step(closure)
        yield Update(loss=losses[0], work=float(len(losses)), number=_LBFGS_AT_ONCE)
