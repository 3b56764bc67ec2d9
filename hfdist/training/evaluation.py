"""Loss and metrics of a model on held-out data."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.comm import Communicator
from hfdist.config.job import RunConfig
from hfdist.curvature.microbatch import as_sum
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import MicrobatchPlan
from hfdist.data.stream import Stream, is_stream
from hfdist.data.stream_loader import stream_batches
from hfdist.errors import TaskError
from hfdist.tasks.task import Batch, Outputs, Task, num_examples
from hfdist.tasks.user_code import length


class Evaluator:
    """Evaluates models on a task's held-out data.

    Args:
        task: Its `eval_data` is called here.
        config: The job.
        comm: The ranks, which share the data.
        processes: That load it; 0: this one.

    Raises:
        DataError: The data is empty, or is no data set.
    """

    def __init__(
        self, task: Task, config: RunConfig, comm: Communicator, processes: int = 0
    ) -> None:
        self._task, self._comm, self._size = task, comm, config.evaluate.batch
        self._dtype = getattr(torch, config.dtype)
        what = f"{type(task).__name__}.eval_data()"
        data = task.eval_data()
        self.has_data = data is not None
        self.num_examples: int | None = None
        """None where there is no data, or a stream that was not read yet."""
        self._stream = Stream(data, what) if is_stream(data) else None
        self._plans: list[MicrobatchPlan] = []
        self._loader: BatchLoader | None = None
        if self._stream is not None or not self.has_data:
            return
        self.num_examples = length(data, what, "evaluate on")
        assert self.num_examples is not None
        self._plans = evaluation_plans(self.num_examples, self._size, comm.rank, comm.world_size)
        self._loader = BatchLoader(
            *(task, data, comm.device, self._dtype, "eval_data"),
            processes=processes if self._plans else 0,
            seed=config.seed,
        )
        self._loader.expect((0, plan) for plan in itertools.cycle(self._plans))

    def of(self, model: nn.Module) -> dict[str, float]:
        """Loss and metrics, see `evaluate_batches`."""
        if self._stream is None:
            assert self._loader is not None
            batches: Iterable[Batch] = map(self._loader.load, self._plans)
            return evaluate_batches(self._task, model, batches, self._comm)
        batches = stream_batches(
            *(self._task, self._stream, self._size, self._comm.rank, self._comm.world_size),
            *(self._comm.device, self._dtype),
        )
        found = evaluate_batches(self._task, model, batches, self._comm)
        self.num_examples = self._stream.num_read
        return found

    def close(self) -> None:
        """End what loads in the background."""
        if self._loader is not None:
            self._loader.close()


def evaluate(
    task: Task,
    model: nn.Module,
    loader: BatchLoader,
    num_examples_total: int,
    comm: Communicator,
    batch_size: int,
) -> dict[str, float]:
    """`evaluate_batches` of a data set with a length."""
    plans = evaluation_plans(num_examples_total, batch_size, comm.rank, comm.world_size)
    return evaluate_batches(task, model, map(loader.load, plans), comm)


def evaluate_batches(
    task: Task, model: nn.Module, batches: Iterable[Batch], comm: Communicator
) -> dict[str, float]:
    """Mean loss and metrics over a data set, sharded over ranks: {"loss": .., metric: ..}.

    The model is in evaluation mode meanwhile and back in its own mode afterwards.

    Args:
        batches: This rank's.
    """
    differentiates = False
    sums: dict[str, Tensor] = {}  # name -> [2] float64: sum, weight
    zero = torch.zeros(2, dtype=torch.float64, device=comm.device)
    with _eval_mode(model):
        for batch in batches:
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


def evaluation_plans(
    num_examples: int, batch_size: int, rank: int, world_size: int
) -> list[MicrobatchPlan]:
    """This rank's share of a data set, in batches."""
    starts = range(0, num_examples, batch_size)
    return [
        MicrobatchPlan(
            number=number,
            indices=torch.arange(start, min(start + batch_size, num_examples)),
        )
        for number, start in enumerate(starts)
        if number % world_size == rank
    ]


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
