"""One microbatch as a function of the current parameters: its loss, its outputs, its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.curvature.linearize import Recorder
from hfdist.curvature.loss_hessian import ClosedForm, LossCall, LossWatch, closed_form
from hfdist.curvature.outputs import differentiable_tensors, reached_first, replaced
from hfdist.errors import TaskError
from hfdist.tasks.task import Batch, Outputs, Task, num_examples


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A forward pass of one microbatch."""

    loss_sum: Tensor
    """Scalar: sum of the losses, before division by the global weight."""
    weight: float | Tensor
    """What the sum is to be divided by, summed over microbatches and ranks."""
    outputs: list[Tensor]
    """z: the differentiable output tensors, attached to the parameters' graph."""
    loss_inputs: list[Tensor]
    """The tensors that the loss was computed from: z itself, or detached copies of it."""

    loss_calls: Sequence[LossCall] = ()
    """Calls of loss functions that are known in closed form."""
    loss_recorder: Recorder | None = None
    """Followed the loss inputs to these calls."""

    def closed_form(self) -> ClosedForm | None:
        """Hessian of the loss in its inputs, if it is one of those known in closed form."""
        if not self.is_split:
            return None
        return closed_form(self.loss_sum, self.loss_inputs, self.loss_calls, self.loss_recorder)

    @property
    def is_split(self) -> bool:
        """Whether the loss hangs on copies of z: then its derivatives in z are partial ones."""
        return any(a is not b for a, b in zip(self.outputs, self.loss_inputs))


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """A way to evaluate the same examples again and again."""

    evaluate: Callable[[bool, Recorder | None], Evaluation]
    """Forward pass at the current parameters. The first argument asks to split the loss from the
    outputs (see `Evaluation.is_split`), where that is possible; the second watches the pass."""
    seed: int
    """Seed of its random numbers: the same in every evaluation of a step."""


def from_task(task: Task, model: nn.Module, batch: Batch, seed: int) -> Microbatch:
    """Microbatch of a task's model and loss."""
    name = f"{type(task).__name__}.loss"
    n = num_examples(batch)

    def loss_of(outputs: Outputs) -> tuple[Tensor, float | Tensor]:
        return as_sum(task.loss(outputs, batch), n, task.loss_reduction, name)

    return from_parts(lambda: task.forward(model, batch), loss_of, seed, name)


def from_parts(
    forward: Callable[[], Outputs],
    loss_of: Callable[[Outputs], tuple[Tensor, float | Tensor]],
    seed: int,
    name: str = "the loss",
) -> Microbatch:
    """Microbatch of a forward pass and a loss of nothing but its outputs, as (sum, weight)."""

    def evaluate(split: bool, recorder: Recorder | None = None) -> Evaluation:
        with recorder or nullcontext():
            outputs = forward()
        z = z_in = differentiable_tensors(outputs)
        if split and z:
            copies = {id(t): t.detach().requires_grad_() for t in z}
            z_in = list(copies.values())
            outputs = replaced(outputs, copies)
        watch = LossWatch()
        follow = Recorder(z_in, rearrangements_only=True) if split and z else None
        with watch if follow else nullcontext(), follow or nullcontext():
            loss_sum, weight = loss_of(outputs)
        if torch.is_grad_enabled() and not loss_sum.requires_grad:
            raise TaskError(
                f"{name} is not differentiable: it has no graph to the model's outputs. "
                "Compute it with torch operations from the outputs, without detach, item or no_grad"
            )
        return Evaluation(
            loss_sum=loss_sum,
            weight=weight,
            outputs=z,
            loss_inputs=z_in,
            loss_calls=watch.calls,
            loss_recorder=follow,
        )

    return Microbatch(evaluate=evaluate, seed=seed)


def from_closure(forward: Callable[[], Sequence[Any]], seed: int) -> Microbatch:
    """Microbatch of a closure that returns (loss, outputs), or (loss, outputs, weight) with the loss
    a mean of the given weight (the number of this rank's examples, say)."""

    def evaluate(split: bool, recorder: Recorder | None = None) -> Evaluation:
        with recorder or nullcontext():
            result = forward()
        if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
            raise TypeError("forward() must return (loss, outputs) or (loss, outputs, weight)")
        loss, outputs = result[0], result[1]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError("forward() must return a scalar tensor as its loss")
        weight = result[2] if len(result) == 3 else 1.0
        z = differentiable_tensors(outputs)
        if split and loss.requires_grad:
            z = reached_first(loss, z)
        loss_sum = loss.reshape(()) * weight if len(result) == 3 else loss.reshape(())
        return Evaluation(loss_sum=loss_sum, weight=weight, outputs=z, loss_inputs=z)

    return Microbatch(evaluate=evaluate, seed=seed)


def as_sum(loss: Any, n: int, reduction: str, name: str) -> tuple[Tensor, float | Tensor]:
    """(sum, weight) of what a loss function returned for n examples.

    Raises:
        TaskError: It is neither a scalar nor a pair of scalars.
    """
    if isinstance(loss, (tuple, list)) and len(loss) == 2:
        total, weight = loss
        if isinstance(total, Tensor) and total.numel() == 1:
            if isinstance(weight, Tensor):
                weight = weight.detach()
                if weight.numel() != 1:
                    raise TaskError(f"{name}: the weight of the pair must be a scalar")
            return total.reshape(()), weight
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = (
            f"a tensor of shape {list(loss.shape)}"
            if isinstance(loss, Tensor)
            else repr(type(loss))
        )
        raise TaskError(
            f"{name} must return a scalar tensor or a pair (sum, weight), not {got}. "
            "Take the mean over the examples, or return (losses.sum(), number)"
        )
    if reduction == "sum":
        return loss.reshape(()), float(n)
    return loss.reshape(()) * n, float(n)
