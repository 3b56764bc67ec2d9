"""The others, on differential equations: what is usual there, each with a grid.

Adam with a warm-up and a cosine over the seconds; L-BFGS; Adam for a quarter of the seconds and L-BFGS for
the rest, the common recipe (Rathore et al. 2024, arXiv:2402.01868); SOAP, ahead of both in the comparison of
Wang et al. 2025 (arXiv:2502.00604).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from torch import nn

from hfdist.bench.optimizers.arena import Arena
from hfdist.bench.optimizers.curve import Update
from hfdist.bench.optimizers.rivals import (
    Grid,
    Setting,
    Start,
    adam,
    first_order,
    lbfgs,
    lbfgs_updates,
    scheduled,
    soap,
)

ADAM_PART = 0.25
"""Of the seconds, before L-BFGS takes over."""


def grids() -> dict[str, Grid]:
    """Of the rivals whose packages are installed."""
    has_soap = importlib.util.find_spec("pytorch_optimizer") is not None
    return {
        "Adam": lambda arena: scheduled(adam, (1e-3, 3e-3, 1e-2), (True,)),
        "L-BFGS": lbfgs,
        "Adam, then L-BFGS": _adam_then_lbfgs,
        **({"SOAP": lambda arena: scheduled(soap, (3e-3, 1e-2), (True,))} if has_soap else {}),
    }


def _adam_then_lbfgs(arena: Arena) -> list[Setting]:
    def start(lr: float) -> Start:
        first = first_order(adam(lr), schedule=False)

        def updates(arena: Arena, model: nn.Module, spent: Callable[[], float]) -> Iterator[Update]:
            for update in first(arena, model, spent):
                yield update
                if spent() >= ADAM_PART:
                    break
            yield from lbfgs_updates(arena, model, spent, history=100)

        return updates

    return [Setting(text=f"lr {lr:g}, history 100", start=start(lr)) for lr in (3e-3, 1e-2)]
