"""Tasks whose loss is a sum of squares are taken by the solvers of residuals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfdist.comm import SerialCommunicator
from hfdist.config.job import from_dict
from hfdist.errors import TaskError
from hfdist.optim.step import HFState
from hfdist.rundir.stop import StopRequest
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.task import Task
from hfdist.training.coordinator import Progress
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, Worker

N = 40


class Plain(Task):
    """Two outputs an example; the loss as the reduction has it."""

    sum_of_squares = False

    def __init__(self, reduction: str = "mean") -> None:
        self._reduction = reduction
        if reduction == "sum":
            self.loss_reduction = "sum"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))

    def train_data(self) -> ArrayData:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(N, 2, generator=generator)
        return ArrayData(x, torch.stack((x.prod(1), x[:, 0].sin()), 1))

    def loss(self, outputs: Any, batch: Any) -> Any:
        squares = nn.functional.mse_loss(outputs, batch[1], reduction="sum")
        if self._reduction == "pair":
            return squares, 2.0 * len(outputs)
        return squares if self._reduction == "sum" else squares / len(outputs)


class Squares(Plain):
    sum_of_squares = True


class Classes(Plain):
    """What it says is not so."""

    sum_of_squares = True

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, (batch[1][:, 0] > 0).long())


class Coupled(Squares):
    """Squares, but of sums of several outputs."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs.sum(1), batch[1][:, 0])


def worker(tmp_path: Path, task: str, **values: Any) -> Worker:
    config = {"task": f"{__file__}:{task}", "device": "cpu", "dtype": "float64", **values}
    job = Job(config=from_dict(config), run_dir=tmp_path)
    return Worker(job, SerialCommunicator("cpu"), QuietDisplay(), StopRequest())


def after(tmp_path: Path, task: str, steps: int = 3, **values: Any) -> Tensor:
    """Parameters after some steps."""
    one = worker(tmp_path, task, **values)
    progress = Progress(state=HFState(damping=1.0))
    for _ in range(steps):
        one.step(progress)
    return one.params.read().clone()


@pytest.mark.parametrize("reduction", ["mean", "sum", "pair"])
def test_the_step_is_that_of_the_products_written_out(tmp_path: Path, reduction: str) -> None:
    common: dict[str, Any] = {"task_args": {"reduction": reduction}}
    options = {"geodesic_acceleration": False, "weight_decay": 1e-3}
    found = after(tmp_path, "Squares", **common, optim=options)
    truth = after(tmp_path, "Plain", **common, optim={**options, "solver": "dense"})
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)


def test_microbatches_and_new_examples_in_every_step(tmp_path: Path) -> None:
    batches = {"gradient": 24}
    whole = after(tmp_path, "Squares", batches=batches)
    parts = after(tmp_path, "Squares", batches={**batches, "microbatch": 5})
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)
    options = {"solver": "sample_space"}
    same = after(tmp_path, "Squares", batches=batches, optim=options)
    torch.testing.assert_close(whole, same, rtol=1e-6, atol=1e-9)


def test_auto_goes_by_the_residuals_of_a_step(tmp_path: Path) -> None:
    """Two an example."""
    one = worker(tmp_path, "Squares", batches={"gradient": 24})
    assert (one._num_residuals, one._solves_rows()) == (48, True)
    assert not worker(tmp_path, "Plain")._solves_rows()
    assert not worker(tmp_path, "Squares", optim={"solver": "krylov"})._solves_rows()


@pytest.mark.parametrize("task", ["Classes", "Coupled"])
def test_another_loss_is_told(tmp_path: Path, task: str) -> None:
    with pytest.raises(TaskError, match="no sum of squares"):
        after(tmp_path, task, steps=1)
