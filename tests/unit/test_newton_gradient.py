"""The Newton direction as a gradient for torch's optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hfdist import HessianFree, newton_gradient


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    return nn.Sequential(*layers).double()


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return x, x[:, :3].argmax(1)


LOSS = nn.functional.cross_entropy
RULES = {"solver": "cg", "preconditioner": "none", "damping": 0.1}


def test_sgd_of_rate_one_takes_the_hessian_free_step() -> None:
    """Parameters, batch-norm statistics, damping and warm starts follow the same way."""
    model, (x, y) = net(), data()
    other = copy.deepcopy(model)
    plain = HessianFree(model.parameters(), **RULES)
    newton = HessianFree(other.parameters(), **RULES)
    sgd = torch.optim.SGD(other.parameters(), lr=1.0)
    for _ in range(4):
        loss = plain.acc_step(model, LOSS, [(x[:10], y[:10]), (x[10:], y[10:])])
        before = newton_gradient(newton, other, LOSS, [(x[:10], y[:10]), (x[10:], y[10:])])
        sgd.step()
        assert plain.report is not None
        assert before == pytest.approx(plain.report.loss, rel=1e-9)
        assert newton.report is not None
        assert newton.report.final_loss == pytest.approx(loss, rel=1e-9)
        for p, q in zip(model.state_dict().values(), other.state_dict().values()):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_parameters_stay_and_momentum_is_the_optimizers() -> None:
    model, (x, y) = net(), data()
    newton = HessianFree(model.parameters(), **RULES)
    adam = torch.optim.Adam(model.parameters(), lr=0.05)

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return LOSS(outputs, y), outputs

    before = [p.detach().clone() for p in model.parameters()]
    losses = [newton_gradient(newton, forward)]
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    adam.step()
    losses += [adam.step(lambda: newton_gradient(newton, forward)) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    assert newton.step(forward) < losses[-1]  # and its own steps move again
    assert not all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_a_rejected_step_is_a_zero_gradient() -> None:
    model, (x, y) = net(), data()
    newton = HessianFree(model.parameters(), **RULES)
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return LOSS(outputs, y) * torch.nan, outputs

    newton_gradient(newton, forward)
    assert newton.report is not None
    assert not newton.report.accepted
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_error_leaves_the_optimizer_as_it_was() -> None:
    model, (x, y) = net(), data()
    newton = HessianFree(model.parameters(), **RULES)

    def broken() -> tuple[Tensor, Tensor]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        newton_gradient(newton, broken)
    before = [p.detach().clone() for p in model.parameters()]
    newton.step(lambda: (LOSS(model(x), y), None), mvp=lambda v: v)
    assert not all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_the_metric_alone_is_a_cheap_newton() -> None:
    """Small batches drawn anew, a diagonal metric, momentum of SGD: no products, and the loss falls."""
    model, (x, y) = net(), data(96)
    newton = HessianFree(model.parameters(), solver="metric", preconditioner="none")
    sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    whole = LOSS(model(x), y).item()
    for k in range(30):
        part = torch.arange(k * 24, (k + 1) * 24) % 96
        newton_gradient(newton, model, LOSS, [(x[part], y[part])])
        sgd.step()
    assert LOSS(model(x), y).item() < 0.7 * whole
    assert sum(report.num_products for report in newton.history) == 0
