"""Work of a step of the solvers of residuals, against a count by hand: a forward pass is 1/3 of a gradient, a
backward pass 2/3, a number of every example's row times a number 1/3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hfdist.comm import Communicator, SerialCommunicator
from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.jacobian_rows import UseWatch, of_products
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.optim.options import HFOptions
from hfdist.optim.step import HFState, hf_step
from hfdist.tasks.task import Task

N, OUTPUTS = 12, 2


class Squares(Task):
    def __init__(self, batch_norm: bool = False) -> None:
        self._batch_norm = batch_norm

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(4, affine=False)] if self._batch_norm else []
        return nn.Sequential(nn.Linear(3, 4), *norm, nn.Tanh(), nn.Linear(4, OUTPUTS)).double()

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, batch[1])


def work(
    comm: Communicator,
    solver: str,
    options: dict[str, Any],
    *,
    batch_norm: bool = False,
    others: bool = False,
) -> float:
    """Of a step; `others`: its rows are of half of the examples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(N, OUTPUTS, generator=generator, dtype=torch.float64)
    task = Squares(batch_norm)
    model = task.model()
    n = N // comm.world_size
    own = slice(comm.rank * n, (comm.rank + 1) * n)
    half = slice(own.start, own.start + n // 2)
    role = [from_task(task, model, (x[own], y[own]), 0)]
    problem = Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(
            gradient=role,
            curvature=[from_task(task, model, (x[half], y[half]), 0)] if others else role,
            loss=role,
        ),
        comm=comm,
        residuals=True,
        row_solver=not others,
        engine=ProductEngine(),
        frozen=FixedRandomness(torch.device("cpu"), model),
    )
    state = HFState(damping=1e3, explore=False)  # the first trial is taken
    report, _ = hf_step(problem, state, HFOptions(solver=solver, **options))  # type: ignore[arg-type]
    assert report.num_loss_evaluations == 1
    return report.work


PLAIN: dict[str, Any] = {"geodesic_acceleration": False}
FORWARD, BACKWARD, PRODUCT, LOSS = 1 / 3, 2 / 3, OUTPUTS / 3, 1 / 3
MADE = FORWARD + OUTPUTS * BACKWARD + PRODUCT
"""Forward pass, rows, J'r."""


def test_by_hand() -> None:
    serial = SerialCommunicator()
    # J'y, Jv for the model.
    expected = MADE + 2 * PRODUCT + LOSS
    assert work(serial, "sample_space", PLAIN) == pytest.approx(expected)
    # J'J is a matrix: no pass.
    assert work(serial, "dense", PLAIN) == pytest.approx(MADE + LOSS)
    # Residuals at v / 10 (Jv is known) and J' of what is not linear in them; the same at v + a / 2.
    curved = {"geodesic_limit": 1e9}
    expected += FORWARD + PRODUCT + FORWARD + 2 * PRODUCT
    assert work(serial, "sample_space", curved) == pytest.approx(expected)
    expected = MADE + 2 * (FORWARD + 2 * PRODUCT) + LOSS
    assert work(serial, "dense", curved) == pytest.approx(expected)


def test_one_row_after_the_other_is_a_pass_over_all_examples() -> None:
    rows = N * OUTPUTS * BACKWARD
    expected = FORWARD + rows + PRODUCT + LOSS
    assert work(SerialCommunicator(), "dense", PLAIN, batch_norm=True) == pytest.approx(expected)


def test_rows_of_other_examples() -> None:
    # J'y, and of the gradient's part that is no combination of rows: Je, and again Jv.
    expected = 1 + 0.5 * (MADE + 3 * PRODUCT) + LOSS
    found = work(SerialCommunicator(), "sample_space", PLAIN, others=True)
    assert found == pytest.approx(expected)


@pytest.mark.ranks
@pytest.mark.parametrize("solver", ["dense", "sample_space"])
def test_ranks_count_the_same(solver: str) -> None:
    serial = work(SerialCommunicator(), solver, {})
    assert on_ranks(2, work, solver, {}) == [pytest.approx(serial)] * 2


def test_a_product_with_rows_beside_a_pass() -> None:
    """Multiplications of the pass by torch's own counter: a recurrent net uses its weights in each step."""
    torch.manual_seed(0)
    n, steps, units = 7, 5, 6
    W, V = torch.randn(units, units) / 3, torch.randn(units, 1)
    for t in (W, V):
        t.requires_grad_()
    h = torch.randn(n, units)
    watch = UseWatch([W, V], n)
    with FlopCounterMode(display=False) as count, watch:
        for _ in range(steps):
            h = torch.tanh(h @ W)
        h @ V
    P = W.numel() + V.numel()
    expected = n * P / (count.get_total_flops() / 2 / n)
    assert of_products(watch.finish(), n, P, n) == pytest.approx(expected)
    assert expected == pytest.approx(n * P / (steps * W.numel() + V.numel()))
