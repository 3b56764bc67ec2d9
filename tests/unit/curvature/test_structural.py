"""Structural damping: lambda mu J_h' J_h of the hidden states, against dense Jacobians."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import hfdist
from hfdist import HessianFree
from hfdist.comm import Communicator, SerialCommunicator
from hfdist.config.job import from_dict
from hfdist.curvature.microbatch import chosen
from hfdist.data.plan import MicrobatchPlan
from hfdist.errors import TaskError
from hfdist.optim.options import HFOptions
from hfdist.optim.solvers import System, krylov
from hfdist.optim.step import HFState
from hfdist.rundir.stop import StopRequest
from hfdist.training.coordinator import Progress
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, Worker

TASK = "hfdist.tasks.sequences:LSTMAddition"
SMALL = {"examples": 6, "evaluation": 0, "hidden": 3, "length": 5}


def worker(tmp_path: Path, comm: Communicator | None = None, **changes: Any) -> Worker:
    values = {
        "task": TASK,
        "task_args": SMALL,
        "device": "cpu",
        "dtype": "float64",
        "optim": {"structural_damping": 0.3, "damping": 2.0, "preconditioner": "none"},
        **changes,
    }
    job = Job(config=from_dict(values), run_dir=tmp_path)
    return Worker(job, comm or SerialCommunicator("cpu"), QuietDisplay(), StopRequest())


def matrix(worker: Worker, damping: float = 0.0) -> Tensor:
    problem = worker.problem(0)
    problem.loss_and_gradient()
    B = problem.curvature(damping)
    return torch.stack([B(v).clone() for v in torch.eye(problem.numel, dtype=torch.float64)])


def hidden_jacobian(worker: Worker, batch: Any = None) -> Tensor:
    """[examples * time * hidden, P], by default of the whole training data."""
    model = worker.model
    batch = worker._loader.first(6) if batch is None else batch
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
    found = matrix(with_term, 2.0) - matrix(without, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert float(expected.norm()) > 0.01


@pytest.mark.parametrize("microbatch", [None, 30])
def test_some_of_many_examples_are_enough(tmp_path: Path, microbatch: int | None) -> None:
    """A quarter, however they are cut into microbatches, and cheaper by that."""
    one = worker(
        tmp_path,
        task_args={**SMALL, "examples": 300, "length": 2, "hidden": 2},
        batches={"microbatch": microbatch, "curvature": None},
        optim={"structural_damping": 0.3, "preconditioner": "none"},
    )
    problem = one.problem(0)
    problem.loss_and_gradient()
    S = problem.structural_matrix
    assert S is not None
    plan = one._plan(0).gradient.microbatches
    kept = [m.indices[chosen(b.example_seeds, 0.25)] for m, b in zip(plan, problem.roles.curvature)]
    indices = torch.cat(kept)
    assert 55 < len(indices) < 95
    batch = one._loader.load(MicrobatchPlan(number=0, indices=indices))
    J = hidden_jacobian(one, batch)
    found = torch.stack([S(v).clone() for v in torch.eye(problem.numel, dtype=torch.float64)])
    torch.testing.assert_close(found, J.T @ J / len(indices), rtol=1e-6, atol=1e-10)
    share = len(indices) / 300
    assert problem.costs.product == pytest.approx(4 / 3 * (1 + share))


def after_steps(comm: Communicator, folder: Path, solver: str) -> Tensor:
    one = worker(
        folder,
        comm,
        task_args={**SMALL, "examples": 300, "length": 2},
        batches={"microbatch": 20},
        optim={"structural_damping": 1.0, "solver": solver, "cg_max_iter": 6, "krylov_max_dim": 6},
    )
    progress = Progress(state=HFState(damping=1.0))
    for _ in range(3):
        one.step(progress)
    return one.params.read().clone()


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["krylov", "cg"])
def test_ranks_take_the_serial_step(tmp_path: Path, solver: str) -> None:
    serial = after_steps(SerialCommunicator("cpu"), tmp_path, solver)
    for found in on_ranks(2, after_steps, tmp_path, solver):
        torch.testing.assert_close(found, serial, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", ["krylov", "cg"])
def test_it_damps_and_is_no_part_of_the_model(tmp_path: Path, solver: str) -> None:
    """The undamped model, which the reduction ratio and the share of the examples go by, is the loss's."""
    one = worker(
        tmp_path, optim={"structural_damping": 3.0, "preconditioner": "none", "solver": solver}
    )
    B = matrix(one)
    problem = one.problem(0)
    loss, g = problem.loss_and_gradient()
    g, before = g.clone(), one.params.read().clone()
    report = one.step(Progress(state=HFState(damping=0.5)))
    delta = (one.params.read() - before) / report.alpha
    model = float(g @ delta + 0.5 * delta @ B @ delta)
    assert report.alpha == 1.0
    assert report.reduction_ratio_undamped == pytest.approx((report.final_loss - loss) / model)


def test_every_candidate_of_a_krylov_space_has_its_own(tmp_path: Path) -> None:
    """Each minimises the model with lambda (1 + mu S) in the space of -g, Bg, B^2 g, where lambda and mu
    count by the curvatures of B and S along g."""
    mu = 2.0
    one = worker(tmp_path, optim={"preconditioner": "none"})
    B, J = matrix(one), hidden_jacobian(one)
    S = J.T @ J / 6
    problem = one.problem(0)
    g = problem.loss_and_gradient()[1].clone()
    options = HFOptions(
        preconditioner="none",
        structural_damping=mu,
        krylov_max_dim=3,
        krylov_min_dim=3,
        krylov_momentum=False,
    )
    system = System(
        curvature=lambda damping: lambda v: B @ v,
        exact_curvature=lambda damping: lambda v: B @ v,
        b=-g,
        damping=0.1,
        structural=lambda: lambda v: S @ v,
    )
    solution = krylov.solve(system, options)
    u = g / g.norm()
    U = torch.linalg.qr(torch.stack((g, B @ g, B @ B @ g), 1))[0]
    assert len(solution.candidates) > 5
    for k, candidate in enumerate(solution.candidates):
        shift = candidate.damping * (u @ B @ u)
        A = B + shift * (torch.eye(len(g), dtype=g.dtype) + mu * S / (u @ S @ u))
        expected = U @ torch.linalg.solve(U.T @ A @ U, -U.T @ g)
        torch.testing.assert_close(solution.step(k), expected, rtol=1e-6, atol=1e-10)
        undamped = g @ expected + 0.5 * expected @ B @ expected
        assert candidate.undamped_model == pytest.approx(float(undamped), rel=1e-6)
        assert candidate.model == pytest.approx(
            float(undamped + 0.5 * expected @ (A - B) @ expected), rel=1e-6
        )


def test_the_last_step_has_its_part_of_it(tmp_path: Path) -> None:
    """A last step in the space is damped as any other vector: the one inside the span changes nothing."""
    one = worker(tmp_path, optim={"preconditioner": "none"})
    B, J = matrix(one), hidden_jacobian(one)
    S = J.T @ J / 6
    g = one.problem(0).loss_and_gradient()[1].clone()
    d = torch.randn(len(g), dtype=g.dtype, generator=torch.Generator().manual_seed(0))
    options = HFOptions(
        preconditioner="none", structural_damping=2.0, krylov_max_dim=2, krylov_min_dim=2
    )
    system = System(
        curvature=lambda damping: lambda v: B @ v,
        exact_curvature=lambda damping: lambda v: B @ v,
        b=-g,
        damping=0.1,
        start=d,
        structural=lambda: lambda v: S @ v,
    )
    space = krylov.build(system, options)
    projected, basis = space.projected()
    V = torch.stack([*(space.U.vector(k) for k in range(2)), d], 1) @ torch.tensor(basis.T)
    torch.testing.assert_close(torch.tensor(projected.T), V.T @ B @ V, rtol=1e-8, atol=1e-10)
    u = g / g.norm()
    # In the coordinates of `projected` the damping's matrix is the identity.
    metric = V.T @ S @ V * (2.0 / (u @ S @ u))
    own = torch.eye(3, dtype=g.dtype) - metric  # what is left for the metric C
    assert float(torch.linalg.eigvalsh(own).min()) > 0.0
    first = V[:, :2].T @ V[:, :2]
    torch.testing.assert_close(own[:2, :2], first, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "changes", [{"solver": "dense"}, {"solver": "metric"}, {"krylov_basis": "none"}]
)
def test_what_has_no_such_term_refuses_it(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="structural_damping"):
        HFOptions(structural_damping=0.1, **changes)  # type: ignore[arg-type]


def test_it_counts_as_work_and_leaves_losses_alone(tmp_path: Path) -> None:
    with_term, without = worker(tmp_path), worker(tmp_path, optim={"preconditioner": "none"})
    costs = []
    for one in (with_term, without):
        problem = one.problem(0)
        problem.loss_and_gradient()
        problem.curvature(1.0)
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
