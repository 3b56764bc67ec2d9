"""One microbatch as a function of the current parameters: its loss, its outputs, its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hfdist.curvature.dispatch import Watch
from hfdist.curvature.example_signs import example_seeds as seeds_of_examples
from hfdist.curvature.linearize import Recorder
from hfdist.curvature.loss_hessian import ClosedForm, LossCall, LossWatch, closed_form
from hfdist.curvature.outputs import (
    differentiable_tensors,
    is_computed_from,
    is_reached,
    meets_a_leaf,
    outermost,
    reached_first,
    replaced,
)
from hfdist.curvature.reverse import grad
from hfdist.errors import TaskError
from hfdist.tasks.task import Batch, Outputs, Task, num_examples


class TryAgain(Exception):
    """Something was learned of the loss (see `LossTraits`): evaluate the microbatch anew."""


@dataclass(kw_only=True)
class LossTraits:
    """How a task's loss can be seen as a function of the outputs; found out once, kept for the run."""

    writes_into_outputs: bool = False
    """It is given copies of the outputs that it may write into."""
    is_known: bool = False
    """It was looked at."""
    is_an_output: bool = False
    """The model computes the loss, or a part of it, and returns it among its outputs."""
    is_mixed: bool = False
    """It needs the graph behind the outputs (it differentiates them in the model's inputs), or computes from
    the outputs and the parameters together (it calls the model, too)."""

    @property
    def is_whole(self) -> bool:
        """Whether it cannot be seen as a function of the outputs alone."""
        return self.is_an_output or self.is_mixed


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
    """Calls of functions that are known in closed form."""
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

    evaluate: Callable[[LossTraits | None, Watch | None], Evaluation]
    """Forward pass at the current parameters. With the traits of the loss, the loss is split from the
    outputs (see `Evaluation.is_split`), where that is possible; the recorder watches the pass.

    Raises `TryAgain`."""
    seed: int
    """Seed of its random numbers: the same in every evaluation of a step."""
    num_examples: int = 1
    name: str = "the loss"
    """For messages."""
    example_seeds: Tensor | None = None
    """Seeds of what is drawn for each example, wherever it is evaluated, int64 [n]; None: not known."""
    part: Callable[[float], Microbatch | None] | None = None
    """The same of a share of its examples, or None if that has none of them; None: it is only to be had as
    a whole."""
    part_may_fail: bool = False
    """The loss may hold data of its own, of all examples, which a part of them does not fit."""


def from_task(
    task: Task, model: nn.Module, batch: Batch, seed: int, example_seeds: Tensor | None = None
) -> Microbatch:
    """Microbatch of a task's model and loss; `example_seeds` by default from its seed."""
    name = f"{type(task).__name__}.loss"
    n = num_examples(batch)
    if example_seeds is None:
        example_seeds = seeds_of_examples(seed, torch.arange(n))
    seeds = example_seeds

    def loss_of(outputs: Outputs) -> tuple[Tensor, float | Tensor]:
        return as_sum(task.loss(outputs, batch), n, task.loss_reduction, name)

    def part(share: float) -> Microbatch | None:
        kept = chosen(seeds, share)
        if len(kept) == n or share >= 1.0 or has_batch_statistics(model):
            return whole
        if not len(kept):
            return None
        return from_task(task, model, rows_of(batch, n, kept), seed, seeds[kept])

    microbatch = from_parts(lambda: task.forward(model, batch), loss_of, seed, name)
    whole = replace(
        microbatch,
        num_examples=n,
        name=task.batch_name(batch),
        example_seeds=seeds,
        part=part,
    )
    return whole


def chosen(seeds: Tensor, share: float) -> Tensor:
    """About a share of the examples: by their seeds, so that it does not depend on how they are cut into
    microbatches. int64 [m], ascending."""
    return (seeds.abs().double() / 2.0**63 < share).nonzero().flatten()


def rows_of(batch: Batch, n: int, kept: Tensor) -> Batch:
    """Some examples of a batch of n: of all tensors that have so many rows."""

    def rows(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == n
        return leaf[kept.to(leaf.device, non_blocking=True)] if has_rows else leaf

    return tree_map(rows, batch)


def has_batch_statistics(model: Any) -> bool:
    """Whether an example's outputs may depend on the others'; of what is no module, nobody knows."""
    if not isinstance(model, nn.Module):
        return True
    return any(isinstance(m, _BatchNorm) and m.training for m in model.modules())


def _require_graph(loss: Tensor, name: str) -> None:
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise TaskError(
            f"{name} is not differentiable: it has no graph to the model's outputs. "
            "Compute it with torch operations from the outputs, without detach, item or no_grad"
        )


def from_parts(
    forward: Callable[[], Outputs],
    loss_of: Callable[[Outputs], tuple[Tensor, float | Tensor]],
    seed: int,
    name: str = "the loss",
) -> Microbatch:
    """Microbatch of a forward pass and a loss of nothing but its outputs, as (sum, weight)."""

    def whole(traits: LossTraits | None, recorder: Watch | None) -> Evaluation:
        watch = LossWatch()
        with watch if traits else nullcontext(), ExitStack() as recording:
            recording.enter_context(recorder or nullcontext())
            outputs = forward()
            if traits and not traits.is_mixed:
                recording.close()
            z = differentiable_tensors(outputs)
            loss_sum, weight = loss_of(outputs)
        _require_graph(loss_sum, name)
        if traits:
            z = outputs_of_loss(loss_sum, z, watch.calls, take_last=True) or z
        return Evaluation(
            loss_sum=loss_sum,
            weight=weight,
            outputs=z,
            loss_inputs=z,
            loss_calls=watch.calls,
        )

    def split(traits: LossTraits, recorder: Watch | None) -> Evaluation:
        with recorder or nullcontext():
            outputs = forward()
        z = differentiable_tensors(outputs)
        with torch.no_grad():  # not a detach of the program's, see `verify.HeldFixed`
            leaves = [t.detach() for t in z]
        for leaf in leaves:
            leaf.requires_grad_()
        copies = [t.clone() for t in leaves] if traits.writes_into_outputs else leaves
        outputs = replaced(outputs, {id(t): c for t, c in zip(z, copies)})
        watch, follow = LossWatch(), Recorder(leaves, rearrangements_only=True)
        for leaf, c in zip(leaves, copies):
            follow.follow(leaf, c)
        try:
            with watch, follow:
                loss_sum, weight = loss_of(outputs)
        except Exception as error:
            if "in-place operation" in str(error) and not traits.writes_into_outputs:
                traits.writes_into_outputs = True
                raise TryAgain from None
            if watch.differentiates:  # outputs, whose graph the copies do not have
                traits.is_mixed = True
                raise TryAgain from None
            raise
        _require_graph(loss_sum, name)
        if not traits.is_known:
            traits.is_known = True
            traits.is_an_output = any(
                is_part_of_loss(loss_sum, k, z, leaves) for k in range(len(z))
            )
            traits.is_mixed = (
                watch.differentiates or mixed(loss_sum, leaves, watch.calls) is not None
            )
            if traits.is_whole:
                raise TryAgain
        return Evaluation(
            loss_sum=loss_sum,
            weight=weight,
            outputs=z,
            loss_inputs=leaves,
            loss_calls=watch.calls,
            loss_recorder=follow,
        )

    def evaluate(traits: LossTraits | None, recorder: Watch | None = None) -> Evaluation:
        if traits is None or traits.is_whole:
            return whole(traits, recorder)
        return split(traits, recorder)

    return Microbatch(evaluate=evaluate, seed=seed)


def outputs_of_loss(
    loss: Tensor, outputs: Sequence[Tensor], calls: Sequence[LossCall], *, take_last: bool
) -> list[Tensor]:
    """The outputs that a loss is a function of, found in its graph, where the loss may be among them.

    Args:
        loss: Scalar, attached to the outputs.
        outputs: The differentiable outputs.
        calls: What was noted while the loss was computed: where no output is on its way, the arguments
            of the functions that give it its curvature stand for the outputs.
        take_last: Of outputs that are computed from each other, take the last; otherwise they are refused.

    Raises:
        ValueError: See `reached_first`.
    """
    arguments = mixed(loss, outputs, calls)
    if arguments is not None:
        return arguments
    others = [z for k, z in enumerate(outputs) if not is_part_of_loss(loss, k, outputs, outputs)]
    try:
        z = reached_first(loss, others)
    except ValueError:
        if not take_last:
            raise
        z = [t for t in others if is_reached(loss, [t], without=[o for o in others if o is not t])]
        z = [t for t in z if not any(is_computed_from(o, [t]) for o in z if o is not t)]
    return z or _arguments(loss, calls)


def mixed(
    loss: Tensor, outputs: Sequence[Tensor], calls: Sequence[LossCall]
) -> list[Tensor] | None:
    """Arguments of known functions that a loss is a function of, where one of them is computed from outputs
    and, beside them, from what the outputs are computed from: a residual u_xx + u, say.

    None where there is no such argument, or the loss depends on more than the arguments: then the curvature
    is that of the outputs (see `hfdist.curvature.direct`)."""
    arguments = _arguments(loss, calls)
    is_mixed = any(is_reached(x, outputs) and meets_a_leaf(x, without=outputs) for x in arguments)
    return arguments if is_mixed and not meets_a_leaf(loss, without=arguments) else None


def _arguments(loss: Tensor, calls: Sequence[LossCall]) -> list[Tensor]:
    """Of the known functions that a walk from the loss meets first."""
    calls = [call for call in calls if call.is_current()]
    found = outermost(loss, [call.result for call in calls], [None] * len(calls))
    return list({id(calls[k].input): calls[k].input for k in found}.values())


def is_part_of_loss(
    loss: Tensor, k: int, outputs: Sequence[Tensor], seen: Sequence[Tensor]
) -> bool:
    """Whether output k is a loss itself: a single number that the loss uses and that is computed from other
    outputs, or the only output that it uses, without curvature; or one number an example, computed from
    other outputs, without curvature.

    `seen` are what stands for the outputs in the loss's graph: themselves, or copies."""
    output, copy = outputs[k], seen[k]
    if (output.ndim > 1 and output.numel() != 1) or not is_reached(loss, [copy]):
        return False
    is_computed = is_computed_from(output, outputs)
    if output.numel() == 1:
        others = [s for s in seen if s is not copy]
        return is_computed or (not is_reached(loss, others) and is_linear(loss, copy))
    return is_computed and is_linear(loss, copy)


def is_linear(loss: Tensor, output: Tensor) -> bool:
    """Whether the loss has no curvature in an output."""
    (slope,) = grad(loss, [output], create_graph=True, allow_unused=True)
    return slope is not None and not (slope.requires_grad and is_reached(slope, [output]))


class _BackwardLeftOut(TorchFunctionMode):
    """backward() does nothing inside: closures written for torch's optimizers call it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.backward:
            return None
        return func(*args, **(kwargs or {}))


def from_closure(forward: Callable[[], Any], seed: int) -> Microbatch:
    """Microbatch of a closure that returns (loss, outputs), or (loss, outputs, weight) with the loss
    a mean of the given weight (the number of this rank's examples, say).

    A closure for torch's optimizers returns the loss alone, and calls backward(), which is left out: the
    arguments of losses, squares and other known functions then stand for the outputs."""

    def evaluate(traits: LossTraits | None, recorder: Watch | None = None) -> Evaluation:
        watch = LossWatch()
        with watch if traits else nullcontext(), recorder or nullcontext(), _BackwardLeftOut():
            result = forward()
        if isinstance(result, Tensor):
            result = (result, None)
        if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
            raise TypeError(
                "forward() must return (loss, outputs), (loss, outputs, weight) or the loss alone; it "
                f"returned {type(result).__name__}"
            )
        loss, outputs = result[0], result[1]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError("forward() must return a scalar tensor as its loss")
        _require_graph(loss, "the loss that forward() returned")
        weight = result[2] if len(result) == 3 else 1.0
        z = differentiable_tensors(outputs)
        if traits:
            z = outputs_of_loss(loss, z, watch.calls, take_last=False)
        loss_sum = loss.reshape(()) * weight if len(result) == 3 else loss.reshape(())
        return Evaluation(
            loss_sum=loss_sum, weight=weight, outputs=z, loss_inputs=z, loss_calls=watch.calls
        )

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
