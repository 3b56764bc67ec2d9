"""Scale-sensitive damping: D is a diagonal of the curvature's own units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfdist import HessianFree
from hfdist.comm import SerialCommunicator
from hfdist.config.job import from_dict
from hfdist.optim.step import HFState
from hfdist.rundir.stop import StopRequest
from hfdist.training.coordinator import Progress
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, Worker

SCALED = '''
from hfdist.tasks.small_net import SmallNet

class Scaled(SmallNet):
    """The same task with its loss times a number."""
    def __init__(self, factor=1.0):
        super().__init__(examples=40, hidden=6)
        self.factor = factor

    def loss(self, outputs, batch):
        return self.factor * super().loss(outputs, batch)
'''


def worker(tmp_path: Path, factor: float = 1.0, **optim: Any) -> Worker:
    (tmp_path / "scaled.py").write_text(SCALED)
    config = from_dict(
        {
            "task": f"{tmp_path}/scaled.py:Scaled",
            "task_args": {"factor": factor},
            "device": "cpu",
            "dtype": "float64",
            "optim": {
                "solver": "cg",
                "damping_metric": "diagonal",
                "preconditioner": "none",
                **optim,
            },
        }
    )
    job = Job(config=config, run_dir=tmp_path)
    return Worker(job, SerialCommunicator("cpu"), QuietDisplay(), StopRequest())


def test_the_term_is_a_diagonal_of_the_curvatures_size(tmp_path: Path) -> None:
    problem = worker(tmp_path).problem(0)
    problem.loss_and_gradient()
    eye = torch.eye(problem.numel, dtype=torch.float64)
    B = torch.stack([problem.curvature(0.0)(v).clone() for v in eye])
    A = torch.stack([problem.curvature(0.5)(v).clone() for v in eye])
    term = (A - B) / 0.5
    D = term.diagonal()
    torch.testing.assert_close(term, torch.diag(D), rtol=0.0, atol=1e-9)
    assert problem.damping_scale is not None
    torch.testing.assert_close(problem.damping_scale, D, rtol=1e-6, atol=1e-9)
    assert (D > 0).all()
    assert float((B.diagonal() / D).mean()) == pytest.approx(1.0, rel=0.7)


def test_a_loss_times_a_thousand_takes_the_same_steps(tmp_path: Path) -> None:
    """Not so with the identity, whose lambda has the loss's unit."""
    ends: dict[str, list[Tensor]] = {}
    for metric in ("diagonal", "identity"):
        for factor in (1.0, 1000.0):
            one = worker(tmp_path, factor, damping_metric=metric, cg_max_iter=6)
            one.model.train()
            progress = Progress(state=HFState(damping=1.0))
            for _ in range(3):
                one.step(progress)
            ends.setdefault(metric, []).append(one.params.read().clone())
    torch.testing.assert_close(*ends["diagonal"], rtol=1e-6, atol=1e-8)
    assert float((ends["identity"][0] - ends["identity"][1]).norm()) > 1e-3


def test_a_loop_of_ones_own_is_told_that_it_needs_a_task() -> None:
    net = nn.Linear(2, 1)
    optimizer = HessianFree(net.parameters(), damping_metric="diagonal", solver="cg")
    with pytest.raises(ValueError, match="damping_metric needs"):
        optimizer.step(lambda: (net(torch.ones(1, 2)).sum(), None))
