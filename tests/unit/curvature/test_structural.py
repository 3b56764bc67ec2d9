"""Structural damping: lambda mu J_h' J_h of the hidden states, against dense Jacobians."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hfdist
from hfdist import HessianFree
from hfdist.comm import SerialCommunicator
from hfdist.config.job import from_dict
from hfdist.errors import TaskError
from hfdist.rundir.stop import StopRequest
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, Worker

TASK = "hfdist.tasks.sequences:LSTMAddition"
SMALL = {"examples": 6, "evaluation": 0, "hidden": 3, "length": 5}


def worker(tmp_path: Path, **changes: Any) -> Worker:
    values = {
        "task": TASK,
        "task_args": SMALL,
        "device": "cpu",
        "dtype": "float64",
        "optim": {"structural_damping": 0.3, "damping": 2.0, "preconditioner": "none"},
        **changes,
    }
    job = Job(config=from_dict(values), run_dir=tmp_path)
    return Worker(job, SerialCommunicator("cpu"), QuietDisplay(), StopRequest())


def matrix(worker: Worker, damping: float = 0.0) -> Tensor:
    problem = worker.problem(0)
    problem.loss_and_gradient()
    B = problem.curvature(damping)
    return torch.stack([B(v).clone() for v in torch.eye(problem.numel, dtype=torch.float64)])


def hidden_jacobian(worker: Worker) -> Tensor:
    """[examples * time * hidden, P], of the whole training data."""
    model = worker.model
    batch = worker._loader.first(6)
    params = list(model.parameters())
    states, _ = model.recurrent(batch["sequence"])
    rows = []
    for h in states.flatten():
        parts = torch.autograd.grad(h, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(parts, params)
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_the_term_is_that_of_the_hidden_states(
    tmp_path: Path, cell: str, microbatch: int | None
) -> None:
    """Microbatches pad differently; states behind the end of a sequence are padding's."""
    args = {**SMALL, "cell": cell}
    if microbatch is not None:
        args["length"] = 2  # all of one length
    common: dict[str, Any] = {"task_args": args, "batches": {"microbatch": microbatch}}
    with_term = worker(tmp_path, **common)
    without = worker(tmp_path, **common, optim={"preconditioner": "none", "damping": 2.0})
    J = hidden_jacobian(with_term)
    expected = 0.3 * 2.0 * J.T @ J / 6
    torch.testing.assert_close(matrix(with_term) - matrix(without), expected, rtol=1e-6, atol=1e-9)
    assert float(expected.norm()) > 0.01


def test_it_counts_as_work_and_leaves_losses_alone(tmp_path: Path) -> None:
    with_term, without = worker(tmp_path), worker(tmp_path, optim={"preconditioner": "none"})
    costs = []
    for one in (with_term, without):
        problem = one.problem(0)
        problem.loss_and_gradient()
        problem.curvature()
        costs.append((problem.costs.product, problem.start_loss()))
    assert costs[0][0] == pytest.approx(2 * costs[1][0])
    assert costs[0][1] == costs[1][1]


def test_a_net_that_names_no_hidden_units_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"hidden_units\(\)"):
        worker(tmp_path, task="hfdist.tasks.small_net:SmallNet", task_args={})


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 1)

    def hidden_units(self) -> list[nn.Module]:
        return [self.cell]

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


def test_a_loop_of_ones_own_has_it_too() -> None:
    """Cells that are called again and again; with more of it the hidden states move less."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, 2), torch.randn(8, 1)
    moved = []
    for mu in (0.0, 1.0, 100.0):
        torch.manual_seed(1)
        net = _Net()
        before = net(x).detach()
        optimizer = HessianFree(
            net.parameters(), solver="cg", preconditioner="none", structural_damping=mu
        )
        optimizer.acc_step(net, nn.functional.mse_loss, [(x, y)])
        assert optimizer.report is not None
        assert optimizer.report.accepted
        moved.append((net.cell.weight_hh - _reference(net)).norm().item())
        assert not torch.equal(net(x), before)
    assert moved[0] > moved[1] > moved[2]
    with pytest.raises(TaskError, match="acc_step"):
        optimizer.step(lambda: (net(x).square().mean(), None))


def _reference(net: _Net) -> Tensor:
    torch.manual_seed(1)
    return _Net().cell.weight_hh


def test_it_trains(tmp_path: Path) -> None:
    job = from_dict(
        {
            "task": TASK,
            "task_args": {
                "examples": 32,
                "evaluation": 0,
                "hidden": 6,
                "length": 6,
                "cell": "tanh",
            },
            "steps": 6,
            "device": "cpu",
            "output": str(tmp_path),
            "tracking": {"enabled": False},
            "optim": {"structural_damping": 0.03},
        }
    )
    assert hfdist.train(job)["final_loss"] < 0.15
