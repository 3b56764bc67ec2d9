"""Loss and metrics of a model on held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hfdist.comm import Communicator
from hfdist.curvature.microbatch import as_sum
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import MicrobatchPlan
from hfdist.tasks.task import Task, num_examples


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
    sums: dict[str, Tensor] = {}  # name -> [2] float64: sum, weight
    zero = torch.zeros(2, dtype=torch.float64, device=comm.device)
    with _eval_mode(model), torch.no_grad():
        for number, start in enumerate(range(0, num_examples_total, batch_size)):
            if number % comm.world_size != comm.rank:
                continue
            stop = min(start + batch_size, num_examples_total)
            batch = loader.load(MicrobatchPlan(number=number, indices=torch.arange(start, stop)))
            outputs = task.forward(model, batch)
            n = num_examples(batch)
            values = {"loss": as_sum(task.loss(outputs, batch), n, "mean", "loss")}
            for name, value in task.metrics(outputs, batch).items():
                values[name] = as_sum(value, n, "mean", name)
            if task.loss_reduction == "sum" and values["loss"][1] == n:
                # A plain sum of losses: its mean over the examples.
                values["loss"] = (values["loss"][0] / n, n)
            for name, (total, weight) in values.items():
                pair = torch.stack((total.to(zero), torch.as_tensor(weight).to(zero)))
                sums[name] = sums.get(name, zero) + pair
    # Ranks without a batch do not know the names.
    names = sorted(set().union(*comm.all_gather_object(sorted(sums))))
    if not names:
        return {}
    table = torch.stack([sums.get(name, zero) for name in names])
    comm.all_reduce(table)
    return {
        name: float(total / weight)
        for name, (total, weight) in zip(names, table.tolist())
        if weight
    }


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
