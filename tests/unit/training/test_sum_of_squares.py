"""Tasks whose loss is a sum of squares are taken by the solvers of residuals: those that say so, and those of
which it is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from hfdist.comm import Communicator, SerialCommunicator
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


# -- found out ---------------------------------------------------------------------------------------


class Silent(Plain):
    """Says nothing; the loss is `loss_{kind}`."""

    sum_of_squares = None

    def __init__(self, kind: str = "mean", layer: str = "none", examples: int = N) -> None:
        super().__init__("sum" if kind == "sum" else "mean")
        self._kind, self._layer, self._examples = kind, layer, examples

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        self._model = super().model()
        between = {
            "none": nn.Identity(),
            "dropout": nn.Dropout(0.3),
            "batch_norm": nn.BatchNorm1d(4),
            "layer_norm": nn.LayerNorm(4),
        }
        self._model.insert(2, between[self._layer])
        return self._model

    def train_data(self) -> ArrayData:
        data = super().train_data()
        examples = [data[k] for k in range(self._examples)]
        return ArrayData(*(torch.stack(column) for column in zip(*examples)))

    def loss(self, z: Any, batch: Any) -> Any:
        y, mse = batch[1], nn.functional.mse_loss
        losses: dict[str, Any] = {
            "mean": lambda: mse(z, y),
            "half": lambda: 0.5 * mse(z, y),
            "module": lambda: nn.MSELoss()(z, y) / 3,
            "sum": lambda: mse(z, y, reduction="sum"),
            "pair": lambda: (mse(z, y, reduction="sum"), 2.0 * len(y)),
            "weighted": lambda: 0.2 * mse(z[:, 0], y[:, 0]) + 0.8 * mse(z[:, 1:], y[:, 1:]),
            "each weighted": lambda: (y.abs() * mse(z, y, reduction="none")).mean(),
            "penalty": lambda: mse(z, y) + 1e-3 * sum(p.square().sum() for p in self._params()),
            "of outputs": lambda: mse(z, y) + 1e-3 * z.square().mean(),
            "root": lambda: mse(z, y).sqrt(),
            "negative": lambda: mse(z[:, 0], y[:, 0]) - 0.1 * mse(z[:, 1], y[:, 1]),
            "sums": lambda: mse(z.sum(1), y[:, 0]),
            "classes": lambda: nn.functional.cross_entropy(z, (y[:, 0] > 0).long()),
            "labels": lambda: nn.functional.binary_cross_entropy_with_logits(z, (y > 0).to(z)),
        }
        return losses[self._kind]()

    def _params(self) -> list[Tensor]:
        return list(self._model.parameters())


def found(tmp_path: Path, kind: str = "mean", layer: str = "none", **values: Any) -> bool:
    args = {"kind": kind, "layer": layer}
    return worker(tmp_path, "Silent", task_args=args, **values)._solves_rows()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *(
            (kind, True)
            for kind in ("mean", "half", "module", "sum", "pair", "weighted", "each weighted")
        ),
        *((kind, False) for kind in ("penalty", "of outputs", "root", "negative", "sums")),
        *((kind, False) for kind in ("classes", "labels")),
    ],
)
def test_squares_are_found_in_the_loss(tmp_path: Path, kind: str, expected: bool) -> None:
    assert found(tmp_path, kind) is expected
    options = {"solver": "dense"}
    assert found(tmp_path, kind, optim=options) is expected  # otherwise it is made of products


@pytest.mark.parametrize(
    ("layer", "expected"), [("layer_norm", True), ("dropout", False), ("batch_norm", False)]
)
def test_examples_on_their_own_and_the_same_in_every_step(
    tmp_path: Path, layer: str, expected: bool
) -> None:
    assert found(tmp_path, layer=layer) is expected


@pytest.mark.parametrize(
    "values",
    [
        {"batches": {"gradient": 20}},
        {"batches": {"curvature": 0.5}},
        {"batches": {"line_search": 10}},
        {"optim": {"solver": "krylov"}},
        {"optim": {"damping_metric": "diagonal"}},
        {"optim": {"curvature_opt": "hessian"}},
        {"optim": {"memory_budget": 1000}},
    ],
)
def test_jobs_that_keep_their_solver(tmp_path: Path, values: dict[str, Any]) -> None:
    assert not found(tmp_path, **values)
    assert found(tmp_path, batches={"gradient": N, "microbatch": 7, "curvature": 1.0})


class Noisy(Silent):
    def train_data(self) -> Any:
        data = super().train_data()

        class Drawn(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(data)

            def __getitem__(self, k: int) -> Any:
                x, y = data[k]
                return x + 0.1 * torch.randn(2), y

        return Drawn()


def test_examples_that_are_drawn_whenever_they_are_read(tmp_path: Path) -> None:
    assert not worker(tmp_path, "Noisy")._solves_rows()


def test_too_many_rows(tmp_path: Path) -> None:
    """Of the matrix: 22 parameters, or twice the examples."""
    one = worker(tmp_path, "Silent", task_args={"examples": 3})
    assert one._solves_rows()
    one.num_examples = 501  # of the smaller matrix
    assert one._suits_rows()
    one._outputs_per_example = 9
    assert not one._suits_rows()


def test_the_steps_are_those_of_a_task_that_says_so(tmp_path: Path) -> None:
    silent = after(tmp_path, "Silent", task_args={"kind": "mean"})
    options = {"solver": "dense"}
    torch.testing.assert_close(
        silent, after(tmp_path, "Silent", optim=options), rtol=1e-9, atol=1e-12
    )


class Penalised(Silent):
    sum_of_squares = True


def test_a_task_that_says_so_and_has_a_penalty_is_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no sum of squares"):
        after(tmp_path, "Penalised", steps=1, task_args={"kind": "penalty"})


def decided(comm: Communicator, folder: str) -> tuple[bool, Tensor]:
    config = {"task": f"{__file__}:Silent", "device": "cpu", "dtype": "float64"}
    job = Job(config=from_dict(config), run_dir=Path(folder))
    one = Worker(job, comm, QuietDisplay(), StopRequest())
    progress = Progress(state=HFState(damping=1.0))
    for _ in range(3):
        one.step(progress)
    return one._solves_rows(), one.params.read().clone()


@pytest.mark.ranks
def test_ranks_decide_alike(tmp_path: Path) -> None:
    solves, theta = decided(SerialCommunicator("cpu"), str(tmp_path))
    assert solves
    for ranks_solve, of_ranks in on_ranks(2, decided, str(tmp_path)):
        assert ranks_solve
        torch.testing.assert_close(of_ranks, theta, rtol=1e-7, atol=1e-9)
