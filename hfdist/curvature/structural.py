"""Structural damping of recurrent nets, Martens & Sutskever 2012, section 8.4.

A small change of a recurrent net's weights may change its hidden states altogether, after many time steps,
where the quadratic model of the loss says nothing of it. So the damped matrix gets one more term,
lambda mu S: S is the Gauss-Newton matrix of the hidden units' matching loss, half the squared distance of the
hidden states from what they are now, S = J_h' J_h with J_h their Jacobian. A step then pays for a change.
S damps and is no part of the model, so that some of the examples are enough for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from hfdist.curvature.engines import ProductBuilder
from hfdist.curvature.layout import Product
from hfdist.curvature.microbatch import Microbatch, from_parts
from hfdist.errors import TaskError


@dataclass(frozen=True, kw_only=True)
class StructuralDamping:
    """What is added to a step's curvature."""

    modules: Sequence[nn.Module]
    """The first tensor that each returns is hidden states."""
    mu: float
    """The term's weight beside that of the damping metric."""
    share: float = 1.0
    """Of the curvature's examples, that S is taken from."""


LEAST_EXAMPLES = 64
"""S is taken from at least so many, or from all."""


def hidden_modules(named: Any) -> list[nn.Module]:
    """What a method `hidden_units` returned, checked.

    Raises:
        TaskError: It is no list of modules, or empty.
    """
    found = list(named) if isinstance(named, (list, tuple, nn.ModuleList)) else []
    if not found or not all(isinstance(module, nn.Module) for module in found):
        raise TaskError(
            "optim.structural_damping needs the modules whose outputs are hidden units: return them "
            "from the "
            "model's method hidden_units(), like [self.lstm] (in a loop of your own take acc_step, "
            "which knows "
            "the model), or set optim.structural_damping=0"
        )
    return found


def hidden_microbatch(microbatch: Microbatch, modules: Sequence[nn.Module]) -> Microbatch:
    """A microbatch whose outputs are the hidden states of another one, and whose loss is their matching
    loss."""

    def forward() -> list[Tensor]:
        seen: list[Tensor] = []

        def see(module: nn.Module, inputs: Any, outputs: Any) -> None:
            seen.append(next(t for t in tree_leaves(outputs) if isinstance(t, Tensor)))

        handles = [module.register_forward_hook(see) for module in modules]
        try:
            microbatch.evaluate(None, None)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise TaskError("no module that hidden_units() names was called in the forward pass")
        return seen

    def matching(hidden: Sequence[Tensor]) -> tuple[Tensor, float]:
        losses = [0.5 * F.mse_loss(h, h.detach(), reduction="sum") for h in hidden]
        return sum(losses[1:], start=losses[0]), 1.0

    return from_parts(forward, matching, microbatch.seed, "the hidden units' matching loss")


def count(microbatch: Microbatch) -> int:
    """Its examples, where they are known one by one."""
    seeds = microbatch.example_seeds
    return microbatch.num_examples if seeds is None else len(seeds)


def add_hidden(
    builder: ProductBuilder, microbatch: Microbatch, modules: Sequence[nn.Module], share: float
) -> int:
    """Append the product of a share of a microbatch's examples.

    Returns:
        How many they are.
    """
    part = microbatch if microbatch.part is None else microbatch.part(share)
    if part is None:
        return 0
    try:
        builder.add(hidden_microbatch(part, modules))
    except (RuntimeError, ValueError, IndexError):
        if part is microbatch or not microbatch.part_may_fail:
            raise
        part = microbatch
        builder.add(hidden_microbatch(part, modules))
    return count(part)


@dataclass(kw_only=True)
class Scaled:
    """A product times a number."""

    product: Product
    number: float
    overlaps: bool = False

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        return self.product(v, factor * self.number)
