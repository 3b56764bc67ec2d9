"""How a step is chosen among a solver's candidates, and its size along it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from hfdist.optim.option_group import OptionGroup


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions(OptionGroup):
    """Backtracking over candidates and the line search."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "lr": (0.0, math.inf),
        "linesearch_c": (0.0, 1.0),
        "linesearch_max_iter": (1, math.inf),
        "candidates_per_pass": (1, math.inf),
    }

    use_cg_backtracking: bool = True
    """Choose among the kept CG iterates by their loss [1, sec. 4.6]."""
    cg_backtracking: Literal["efficient", "full"] = "efficient"
    """From the last iterate back while the loss falls, or the best of all kept iterates."""
    lr: float = 1.0
    """Step size; the line search's first try."""
    use_linesearch: bool = True
    """Armijo backtracking line search [2, sec. 8.8]; otherwise the constant `lr`."""
    linesearch_beta: float = 0.8
    """Factor on the step size between tries."""
    linesearch_c: float = 1e-2
    """Armijo constant."""
    linesearch_max_iter: int = 60
    """Tries before the step is rejected."""
    candidates_per_pass: int = 1
    """Losses of CG's iterates and of the line search's tries that are computed before one is looked at.
    The choice is the same; more means fewer reductions and waits of the device, and some losses computed
    in vain."""

    def check(self) -> None:
        if not 0.0 < self.linesearch_beta < 1.0:
            raise ValueError(
                f"linesearch_beta is {self.linesearch_beta}: it must be between 0 and 1"
            )
