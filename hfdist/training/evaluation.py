"""Loss and metrics of a model on held-out data."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.comm import Communicator
from hfdist.curvature.microbatch import as_sum
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import MicrobatchPlan
from hfdist.errors import TaskError
from hfdist.tasks.task import Batch, Outputs, Task, num_examples


def evaluate(
    task: Task,
    model: nn.Module,
    loader: BatchLoader,
    num_examples_total: int,
    comm: Communicator,
    batch_size: int,
) -> dict[str, float]:
    """Mean loss and metrics over a data set, sharded over ranks: {"loss": .., metric: ..}.

    The model is in evaluation mode meanwhile and back in its own mode afterwards.
    """
    differentiates = False
    sums: dict[str, Tensor] = {}  # name -> [2] float64: sum, weight
    zero = torch.zeros(2, dtype=torch.float64, device=comm.device)
    with _eval_mode(model):
        for number, start in enumerate(range(0, num_examples_total, batch_size)):
            if number % comm.world_size != comm.rank:
                continue
            stop = min(start + batch_size, num_examples_total)
            batch = loader.load(MicrobatchPlan(number=number, indices=torch.arange(start, stop)))
            try:
                with torch.set_grad_enabled(differentiates):
                    values = _values(task, model, batch)
            except Exception:
                if differentiates:
                    raise
                differentiates = True  # derivatives of the model in its inputs need gradients
                with torch.enable_grad():
                    values = _values(task, model, batch)
            for name, (total, weight) in values.items():
                pair = torch.stack(
                    (total.detach().to(zero), torch.as_tensor(weight, dtype=torch.float64).to(zero))
                )
                sums[name] = sums.get(name, zero) + pair
    # Ranks without a batch do not know the names.
    names = sorted(set().union(*comm.all_gather_object(sorted(sums))))
    if not names:
        return {}
    table = torch.stack([sums.get(name, zero) for name in names])
    comm.all_reduce(table)
    means = {
        name: float(total / weight)
        for name, (total, weight) in zip(names, table.tolist())
        if weight
    }
    return dict(task.summary(means))


def _values(task: Task, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, float | Tensor]]:
    """(sum, weight) of the loss and of every metric on a batch."""
    outputs = task.forward(model, batch)
    n, name = num_examples(batch), type(task).__name__
    values = {"loss": as_sum(task.loss(outputs, batch), n, "mean", f"{name}.loss")}
    if task.loss_reduction == "sum" and values["loss"][1] == n:
        # A plain sum of losses: its mean over the examples.
        values["loss"] = (values["loss"][0] / n, n)
    for metric, value in _metrics(task, outputs, batch).items():
        values[metric] = as_sum(value, n, "mean", f"{name}.metrics()[{metric!r}]")
    return values


def _metrics(task: Task, outputs: Outputs, batch: Batch) -> dict[str, Any]:
    """The task's metrics of a batch, numbers as tensors.

    Raises:
        TaskError: They are no dict of numbers.
    """
    what = f"{type(task).__name__}.metrics()"
    found = task.metrics(outputs, batch)
    if not isinstance(found, Mapping):
        raise TaskError(
            f"{what} returns {_described(found)}: return a dict like {{'accuracy': tensor}}"
        )
    for name, value in found.items():
        if not isinstance(name, str) or not name:
            raise TaskError(f"{what} returns a value named {name!r}: names must be texts")
        if name == "loss":
            raise TaskError(f"{what} returns a value named 'loss', as the loss itself: rename it")
        parts = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,)
        if not all(_is_number(part) for part in parts):
            raise TaskError(
                f"{what} returns {_described(value)} as {name!r}: return a mean over the examples, or a "
                "pair (sum, weight) of numbers"
            )
    return {name: _as_tensors(value) for name, value in found.items()}


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, numbers.Real)


def _as_tensors(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_as_tensors(part) for part in value)
    # Doubles: not every number is one, and what is none of them is no measure of a model.
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
