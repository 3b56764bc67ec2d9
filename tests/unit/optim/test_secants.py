"""Steps without products: beside the BFGS matrix written out, on whole batches, and where none are taken."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfdist import HessianFree
from hfdist.optim.secants import FIRST, WINDOW, Secants
from hfdist.optim.space import WHOLE, Space

n = 7


def spd(seed: int) -> Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / n + 0.3 * torch.eye(n, dtype=torch.float64)


def walked(number: int, most: int, space: Space = WHOLE, part: slice = slice(None)) -> Secants:
    """After `FIRST` solves and some steps on a quadratic, with its gradient at the end."""
    A, secants = spd(0), Secants()
    theta, step = torch.ones(n, dtype=torch.float64), None
    generator = torch.Generator().manual_seed(1)
    loss = float(theta @ A @ theta) / 2
    for k in range(number + 1):
        secants.begin(-(A @ theta)[part], step, loss, most, space)
        if k == number:
            break
        s = torch.randn(n, generator=generator, dtype=torch.float64)
        theta = theta + s
        step, after = s[part].clone(), float(theta @ A @ theta) / 2
        secants.after(1.0, 1.0, after, moved=True)
        loss = after
    return secants


def dense_direction(number: int, most: int, C: Tensor) -> tuple[Tensor, float]:
    """The recursion of the inverse BFGS matrix, written out (Nocedal & Wright 2006, 6.17)."""
    A = spd(0)
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(number)]
    theta = torch.ones(n, dtype=torch.float64) + sum(steps)
    pairs = [(s, A @ s) for s in steps][-most:]
    s, y = pairs[-1]
    H = float(s @ y) / float(y @ torch.linalg.solve(C, y)) * C.inverse()
    for s, y in pairs:
        V = torch.eye(n, dtype=torch.float64) - torch.outer(s, y) / float(s @ y)
        H = V @ H @ V.T + torch.outer(s, s) / float(s @ y)
    g = A @ theta
    return -H @ g, float(g @ H @ g)


@pytest.mark.parametrize(("number", "most"), [(FIRST, 1), (FIRST, 3), (FIRST, 20), (9, 4)])
def test_the_direction_is_that_of_the_bfgs_matrix_written_out(number: int, most: int) -> None:
    C = spd(3)
    secants = walked(number, most)
    assert secants.leads
    x, slope = secants.direction(C.inverse().mv, WHOLE)
    expected, expected_slope = dense_direction(number, most, C)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
    assert slope == pytest.approx(expected_slope, rel=1e-10)


def test_without_a_metric_it_builds_on_the_identity() -> None:
    x, _ = walked(FIRST, 5).direction(None, WHOLE)
    expected, _ = dense_direction(FIRST, 5, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("most", [2, 10])
def test_the_host_looks_three_times_a_step_however_many_pairs(most: int) -> None:
    calls = []
    counting = Space(total_of=lambda sums: (calls.append(len(sums)), sums)[1])
    secants = walked(FIRST + 2, most, counting)
    before = len(calls)
    secants.direction(None, counting)
    assert len(calls) == before + 2
    secants.after(1.0, 1.0, secants._loss, moved=True)
    secants.begin(torch.ones(n).double(), torch.ones(n).double(), secants._loss, most, counting)
    assert len(calls) == before + 3


def test_survives_a_checkpoint_to_the_bit_in_parts_too() -> None:
    C = spd(3)
    secants = walked(FIRST, 4)
    saved = copy.deepcopy(secants.state_dict(lambda part: part))
    again = Secants()
    again.load_state_dict(saved)
    again.cut(lambda whole: whole)
    again.leads = True
    for found, expected in zip(
        again.direction(C.inverse().mv, WHOLE), secants.direction(C.inverse().mv, WHOLE)
    ):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    lower = Secants()
    lower.load_state_dict(saved)
    lower.cut(lambda whole: whole[:3])
    assert all(len(v) == 3 for pair in lower._pairs for v in pair)
    assert Secants().state_dict(lambda part: part) == {}


def test_forgets_where_the_loss_is_another_one() -> None:
    secants = walked(FIRST, 5)
    b, s = torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    secants.after(1.0, 1.0, 2.0, moved=True)
    secants.begin(b, s, 2.0 * (1 + 1e-6), 5, WHOLE)
    assert not secants.leads
    assert not secants._pairs


def test_keeps_no_pair_that_bends_the_wrong_way_or_of_a_step_that_was_not_taken() -> None:
    for y_sign, moved in ((-1.0, True), (1.0, False)):
        secants, b = Secants(), torch.zeros(n, dtype=torch.float64)
        s = torch.ones(n, dtype=torch.float64)
        secants.begin(b, None, 1.0, 5, WHOLE)
        secants.after(0.1, 1.0, 0.9, moved=moved)
        secants.begin(b - y_sign * s, s, 0.9, 5, WHOLE)
        assert not secants._pairs


def test_solves_come_first_and_when_it_does_not_pay() -> None:
    """The last solve gained 1 a unit of work; steps without products 0.6, then 0.4 of it, then nothing."""
    secants, b = Secants(), torch.zeros(n, dtype=torch.float64)
    s = torch.ones(n, dtype=torch.float64)

    def step(gain: float, moved: bool = True) -> bool:
        nonlocal b
        secants.begin(b, s, 1.0, 5, WHOLE)
        leads = secants.leads
        secants.after(gain, 1.0, 1.0, moved=moved)
        b = b - s
        return leads

    assert [step(1.0) for _ in range(FIRST)] == [False] * FIRST
    assert [step(0.6) for _ in range(3 * WINDOW)] == [True] * (3 * WINDOW)
    assert [step(0.4) for _ in range(WINDOW)].count(False) == 1
    while secants.leads or not step(1.0):  # to the next solve and past it
        pass
    assert step(1.0, moved=False)
    assert not step(1.0)  # nothing was found that way: a solve


# -- in the optimizer --------------------------------------------------------------------------------


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    return model, torch.randn(60, 6).double(), torch.randint(3, (60,))


def run(steps: int, per_step: int | None = None, **options: Any) -> tuple[nn.Module, HessianFree]:
    model, x, labels = problem()
    optimizer = HessianFree(model.parameters(), verbose=False, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        own = slice(None)
        if per_step is not None:
            own = torch.randperm(len(x), generator=generator)[:per_step]  # type: ignore[assignment]

        def forward(own: Any = own) -> tuple[Tensor, Tensor]:
            outputs = model(x[own])
            return nn.functional.cross_entropy(outputs, labels[own]), outputs

        optimizer.step(forward=forward)
    return model, optimizer


def of_secants(optimizer: HessianFree) -> list[bool]:
    return [report.stop == "secants" for report in optimizer.history]


def test_a_whole_batch_takes_them_after_the_first_solves_and_each_lowers_the_loss() -> None:
    _, optimizer = run(16)
    kinds = of_secants(optimizer)
    assert not any(kinds[:FIRST])
    assert kinds[FIRST]
    for kind, report in zip(kinds, optimizer.history):
        assert report.final_loss < report.loss
        assert (report.num_products == 0) == kind
        if kind:
            assert report.next_damping == report.damping
            # gradient, statistics of the metric at most, losses
            assert report.work <= 1 + 5 / 3 + report.num_loss_evaluations / 3 + 1e-9


def test_none_where_they_are_switched_off_or_examples_are_drawn_anew() -> None:
    assert not any(of_secants(run(12, secant_pairs=0)[1]))
    assert not any(of_secants(run(12, per_step=30)[1]))


def test_they_need_no_momentum_of_the_solves() -> None:
    assert any(of_secants(run(10, krylov_momentum=False)[1]))


@pytest.mark.parametrize("preconditioner", ["none", "ggn_diagonal", "nystrom", "ekfac", "kfac"])
def test_any_metric_will_do(preconditioner: str) -> None:
    _, optimizer = run(12, preconditioner=preconditioner)
    assert any(of_secants(optimizer))
    assert optimizer.history[-1].final_loss < 0.5 * optimizer.history[0].loss


def test_a_loss_times_a_thousand_takes_the_same_steps() -> None:
    def end(factor: float) -> Tensor:
        model, x, labels = problem()
        optimizer = HessianFree(model.parameters(), verbose=False)

        def forward() -> tuple[Tensor, Tensor]:
            outputs = model(x)
            return factor * nn.functional.cross_entropy(outputs, labels), outputs

        for _ in range(FIRST + 4):
            optimizer.step(forward=forward)
        assert of_secants(optimizer)[FIRST]
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(end(1.0), end(1000.0), rtol=1e-6, atol=1e-8)


def test_goes_on_from_a_state_dict_to_the_bit() -> None:
    model, x, labels = problem()

    def stepped(optimizer: HessianFree, of: nn.Module, number: int) -> list[bool]:
        def forward() -> tuple[Tensor, Tensor]:
            outputs = of(x)
            return nn.functional.cross_entropy(outputs, labels), outputs

        for _ in range(number):
            optimizer.step(forward=forward)
        return of_secants(optimizer)

    optimizer = HessianFree(model.parameters(), verbose=False)
    stepped(optimizer, model, FIRST + 2)
    other = copy.deepcopy(model)
    again = HessianFree(other.parameters(), verbose=False)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kinds = stepped(again, other, 6)
    assert stepped(optimizer, model, 6)[-6:] == kinds
    assert any(kinds)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert math.isfinite(again.history[-1].loss)
