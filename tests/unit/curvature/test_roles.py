"""Gradient, curvature and loss on examples of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes import passes_of
from torch import Tensor, nn

from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.microbatch import Microbatch, from_parts
from hfdist.curvature.objective import Overrides, Problem, Regularisation, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.verify import Verifier


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def role(model: nn.Module, n: int, seed: int) -> tuple[list[Microbatch], Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    y = torch.randint(2, (n,), generator=g)

    def loss_of(z: Tensor) -> tuple[Tensor, float]:
        return nn.functional.cross_entropy(z, y, reduction="sum"), float(n)

    return [from_parts(lambda: model(x), loss_of, seed)], x, y


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
@pytest.mark.parametrize("shared", ["all", "none", "curvature", "loss"])
def test_each_role_sees_its_own_examples(model: nn.Module, curvature_opt: Any, shared: str) -> None:
    g, gx, gy = role(model, 7, seed=1)
    c, _, _ = (g, gx, gy) if shared in ("all", "curvature") else role(model, 5, seed=2)
    f, fx, fy = (g, gx, gy) if shared in ("all", "loss") else role(model, 9, seed=3)
    params = ParameterVector(model.parameters())
    problem = Problem(
        params=params,
        roles=Roles(gradient=g, curvature=c, loss=f),
        curvature_opt=curvature_opt,
        engine=ProductEngine(verifier=Verifier(mode="off")),
    )
    uncounted = list(c)
    passes = passes_of(problem)
    loss, gradient = problem.loss_and_gradient()
    expected = mean_loss(model, gx, gy)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    grads = torch.autograd.grad(expected, params.tensors)
    torch.testing.assert_close(gradient, params.flatten(grads), rtol=1e-12, atol=1e-14)

    v = torch.linspace(-1, 1, params.numel, dtype=torch.float64)
    other = Problem(
        params=params,
        roles=Roles(gradient=uncounted, curvature=uncounted, loss=uncounted),
        curvature_opt=curvature_opt,
    )
    torch.testing.assert_close(
        problem.curvature()(v).clone(), other.curvature()(v), rtol=1e-12, atol=1e-14
    )
    assert problem.start_loss() == pytest.approx(mean_loss(model, fx, fy).item(), rel=1e-12)
    # Whose forward pass is shared is not evaluated again.
    assert len(passes) == 1 + (c is not g) + (f is not g)


@pytest.mark.parametrize("weight_decay", ["none", "scalar", "diagonal"])
@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("own_product", [False, True])
def test_damping_and_decay_are_added(
    model: nn.Module, weight_decay: str, metric: bool, microbatches: int, own_product: bool
) -> None:
    """A = B + diag(weight decay) + damping * metric; an own product has its own L2 term."""
    microbatch = [m for k in range(microbatches) for m in role(model, 5, seed=k)[0]]
    params = ParameterVector(model.parameters())
    spread = torch.linspace(0.1, 2.0, params.numel, dtype=torch.float64)
    decay = {"none": 0.0, "scalar": 0.3, "diagonal": spread}[weight_decay]
    scale = spread.flip(0) if metric else None
    v = torch.linspace(-1, 1, params.numel, dtype=torch.float64)
    problems = [
        Problem(
            params=params,
            roles=Roles(gradient=microbatch, curvature=microbatch, loss=microbatch),
            regularisation=regularisation,
            overrides=Overrides(product=(lambda v: 2 * v) if own_product else None),
        )
        for regularisation in (
            Regularisation(),
            Regularisation(weight_decay=decay, damping_scale=scale),
        )
    ]
    for problem in problems:
        problem.loss_and_gradient()
    plain, shifted = problems[0].curvature()(v).clone(), problems[1].curvature(0.7)(v)
    added = 0.7 * (1.0 if scale is None else scale) + (0.0 if own_product else decay)
    torch.testing.assert_close(shifted, plain + added * v, rtol=1e-12, atol=1e-14)


def test_own_gradient_and_product_are_used(model: nn.Module) -> None:
    g, _, _ = role(model, 7, seed=1)
    params = ParameterVector(model.parameters())
    mine = torch.arange(params.numel, dtype=torch.float64)
    problem = Problem(
        params=params,
        roles=Roles(gradient=g, curvature=g, loss=g),
        overrides=Overrides(gradient=mine, product=lambda v: 2 * v),
    )
    assert torch.equal(problem.loss_and_gradient()[1], mine)
    assert torch.equal(problem.curvature()(mine), 2 * mine)


def test_losses_leave_the_parameters_alone(model: nn.Module) -> None:
    g, x, y = role(model, 7, seed=1)
    params = ParameterVector(model.parameters())
    problem = Problem(params=params, roles=Roles(gradient=g, curvature=g, loss=g))
    before = params.read()
    delta = torch.ones_like(before)
    losses = problem.losses([(0.5, delta), (-1.0, delta)])
    assert torch.equal(params.read(), before)
    expected = []
    for alpha in (0.5, -1.0):
        params.write(before + alpha * delta)
        expected.append(mean_loss(model, x, y).item())
    assert losses == pytest.approx(expected, rel=1e-12)
