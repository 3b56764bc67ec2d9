"""Losses of the derivatives of a network in its inputs, as programs for differential equations write them.

The residual is r = u_xx + u_yy + u - f; every form of it has the loss, gradient and Gauss-Newton matrix of
the one written out by hand, whatever differentiates, and wherever: in the forward pass, in the loss, or in
both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dense
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from rules import CG
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from hfdist import HessianFree
from hfdist.comm import SerialCommunicator
from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import Microbatch, from_closure, from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.data.loader import BatchLoader
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.task import Task
from hfdist.training.evaluation import evaluate

N = 7


def network() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)
        ).double()


def points() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(N, 2, generator=generator, dtype=torch.float64)


def source(x: Tensor) -> Tensor:
    return torch.sin(3 * x[:, 0]) * x[:, 1]


# -- the Laplacian [n], in every form ----------------------------------------------------------------


def by_hand(model: nn.Sequential, x: Tensor) -> Tensor:
    """Value, gradient and Laplacian, layer by layer: no derivative is taken."""
    h, J, L = x, torch.eye(2, dtype=x.dtype).expand(len(x), 2, 2), torch.zeros_like(x)
    for layer in model:
        if isinstance(layer, nn.Linear):
            h, J, L = layer(h), J @ layer.weight.T, L @ layer.weight.T
        else:
            h = torch.tanh(h)
            d = 1 - h**2
            L = -2 * h * d * (J**2).sum(1) + d * L
            J = d.unsqueeze(1) * J
    return L[:, 0]


def autograd_sums(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return trace(du, x)


def autograd_ones(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = model(x)
    one = torch.ones_like(u)
    (du,) = torch.autograd.grad(u, x, one, create_graph=True, retain_graph=True)
    total = torch.zeros_like(du[:, 0])
    for k in range(2):
        (ddu,) = torch.autograd.grad(du[:, k : k + 1], x, one, create_graph=True)
        total = total + ddu[:, k]
    return total


def trace(du: Tensor, x: Tensor) -> Tensor:
    second = [torch.autograd.grad(du[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(2)]
    return second[0] + second[1]


def at_point(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda p: model(p.unsqueeze(0))[0, 0]


def func_hessian(model: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda p: hessian(lambda q: model(q)[0])(p).diagonal().sum())(x)


def func_jacrev(model: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda p: jacrev(jacrev(at_point(model)))(p).diagonal().sum())(x)


def func_jacfwd(model: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda p: jacfwd(jacfwd(at_point(model)))(p).diagonal().sum())(x)


def func_grad(model: nn.Module, x: Tensor) -> Tensor:
    def at(p: Tensor) -> Tensor:
        g = grad(at_point(model))
        return sum(grad(lambda q, k=k: g(q)[k])(p)[k] for k in range(2))  # type: ignore[misc,return-value]

    return vmap(at)(x)


def _derivative_along(model: nn.Module, e: Tensor, x: Tensor) -> Tensor:
    return jvp(model, (x,), (e,))[1]


def func_jvp(model: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for k in range(2):
        e = torch.zeros_like(x)
        e[:, k] = 1
        along = partial(_derivative_along, model, e)
        total = total + jvp(along, (x,), (e,))[1][:, 0]
    return total


def func_functional_call(model: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())

    def u(parameters: Any, p: Tensor) -> Tensor:
        return functional_call(model, parameters, (p.unsqueeze(0),))[0, 0]

    return vmap(lambda p: hessian(u, argnums=1)(parameters, p).diagonal().sum())(x)


def func_directions(model: nn.Module, x: Tensor) -> Tensor:
    """Along every axis at once: vmap over directions, not points."""

    def along(e: Tensor) -> Tensor:
        t = e.expand_as(x)
        return (jvp(grad(lambda z: model(z).sum()), (x,), (t,))[1] * t).sum(1)

    return vmap(along)(torch.eye(2, dtype=x.dtype)).sum(0)


def dual_numbers(model: nn.Module, x: Tensor) -> Tensor:
    x, total = x.clone().requires_grad_(), torch.zeros_like(x[:, 0])
    for k in range(2):
        e = torch.zeros_like(x)
        e[:, k] = 1
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, e))).tangent
            (g,) = torch.autograd.grad(tangent.sum(), x, create_graph=True)
        total = total + g[:, k]
    return total


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        by_hand,
        autograd_sums,
        autograd_ones,
        func_hessian,
        func_jacrev,
        func_jacfwd,
        func_grad,
        func_jvp,
        func_functional_call,
        func_directions,
        dual_numbers,
    )
}
NOT_REPLAYED = {"dual_numbers"}
by_form = pytest.mark.parametrize("form", FORMS)


def residual(form: str, model: nn.Module, x: Tensor) -> Tensor:
    return FORMS[form](model, x) + model(x)[:, 0] - source(x)


# -- where it is written -----------------------------------------------------------------------------


class InForward(Task):
    def __init__(self, form: str) -> None:
        self.form = form

    def model(self) -> nn.Module:
        return network()

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return residual(self.form, model, batch[0])

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return 0.5 * (outputs**2).mean()

    def train_data(self) -> Any:
        return ArrayData(points())

    eval_data = train_data


class InLoss(InForward):
    """The model gives u; the loss calls it again for the derivatives."""

    network: Any

    def forward(self, model: nn.Module, batch: Any) -> Any:
        self.network = model
        return model(batch[0])

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        x = batch[0]
        r = FORMS[self.form](self.network, x) + outputs[:, 0] - source(x)
        return 0.5 * nn.functional.mse_loss(r, torch.zeros_like(r))


class OfOutputs(InForward):
    """The loss differentiates the outputs themselves."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        batch[0].requires_grad_()
        return model(batch[0])

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        x = batch[0]
        (du,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return 0.5 * (trace(du, x) + outputs[:, 0] - source(x)).square().mean()


def closure(form: str, model: nn.Module, x: Tensor, *, gives: str) -> Callable[[], Any]:
    def forward() -> Any:
        u = model(x)
        r = FORMS[form](model, x) + u[:, 0] - source(x)
        outputs = {"residual": r, "u": u, "nothing": None}[gives]
        return 0.5 * r.square().mean(), outputs

    return forward


def truth(model: nn.Module) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient [P], Gauss-Newton matrix [P, P]."""
    r = residual("by_hand", model, points())
    J = dense.jacobian(r, list(model.parameters()))
    return float(0.5 * (r.detach() ** 2).mean()), J.T @ r.detach() / N, J.T @ J / N


def check(model: nn.Module, microbatches: Sequence[Microbatch], engine: ProductEngine) -> None:
    problem = Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=microbatches, curvature=microbatches, loss=microbatches),
        engine=engine,
        frozen=FixedRandomness(torch.device("cpu"), model),
    )
    expected, g, G = truth(model)
    loss, gradient = problem.loss_and_gradient()
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, g, rtol=1e-10, atol=1e-12)
    B = problem.curvature()
    v = torch.linspace(-1, 1, problem.numel, dtype=torch.float64).sin()
    torch.testing.assert_close(B(v), G @ v, rtol=1e-9, atol=1e-11)
    moved = 0.1 * v
    with problem.params.at(problem.params.read() + moved):
        there = truth(model)[0]
    assert problem.losses([(0.0, v), (0.1, v)]) == pytest.approx([expected, there], rel=1e-12)


@by_form
@pytest.mark.parametrize("where", [InForward, InLoss])
def test_in_tasks(form: str, where: type[InForward]) -> None:
    task, engine = where(form), ProductEngine()
    model = task.model()
    check(model, [from_task(task, model, (points(),), seed=0)], engine)
    assert engine.used == ("double_backward" if form in NOT_REPLAYED else "linearize")


def test_a_loss_that_differentiates_the_outputs() -> None:
    task, engine = OfOutputs("by_hand"), ProductEngine()
    model = task.model()
    check(model, [from_task(task, model, (points(),), seed=0)], engine)
    assert engine.used == "linearize"


@pytest.mark.parametrize("form", ["by_hand", "autograd_sums", "func_hessian", "dual_numbers"])
@pytest.mark.parametrize("gives", ["residual", "u", "nothing"])
def test_in_closures(form: str, gives: str) -> None:
    model, engine = network(), ProductEngine()
    check(model, [from_closure(closure(form, model, points(), gives=gives), seed=0)], engine)
    assert engine.used == ("double_backward" if form in NOT_REPLAYED else "linearize")


@pytest.mark.parametrize("engine", ["double_backward", "recompute"])
@pytest.mark.parametrize("where", [InForward, InLoss, OfOutputs])
def test_other_engines(where: type[InForward], engine: str) -> None:
    task = where("autograd_sums")
    model = task.model()
    check(model, [from_task(task, model, (points(),), seed=0)], ProductEngine(requested=engine))


@pytest.mark.parametrize("where", [InForward, InLoss])
def test_microbatches_add_up(where: type[InForward]) -> None:
    task = where("autograd_ones")
    model = task.model()
    parts = [from_task(task, model, (part,), seed=0) for part in points().split(3)]
    check(model, parts, ProductEngine())


@pytest.mark.parametrize("form", ["by_hand", "autograd_sums", "func_hessian"])
def test_steps_of_the_optimizer_agree(form: str) -> None:
    """A closure, lists of minibatches and a task take the same steps."""
    finals = []
    for how in ("step", "acc_step", "acc_step whose loss differentiates"):
        model = network()
        optimizer = HessianFree(model.parameters(), **CG, cg_stop="residual", cg_tol=1e-12)
        for _ in range(3):
            if how == "step":
                optimizer.step(closure(form, model, points(), gives="residual"))
            elif how == "acc_step":
                optimizer.acc_step(
                    lambda x, model=model: residual(form, model, x),  # type: ignore[misc]
                    lambda r, _: 0.5 * r.square().mean(),
                    [(x, torch.zeros(len(x))) for x in points().split(4)],
                )
            else:
                optimizer.acc_step(
                    model,
                    lambda u, x, model=model: (  # type: ignore[misc]
                        0.5 * (FORMS[form](model, x) + u[:, 0] - source(x)).square().mean()
                    ),
                    [(x, x) for x in points().split(4)],
                )
        assert optimizer.report is not None
        assert optimizer.report.accepted
        finals.append(optimizer.report.final_loss)
    assert finals[1:] == pytest.approx([finals[0]] * 2, rel=1e-6)


@pytest.mark.parametrize("where", [InForward, InLoss, OfOutputs])
def test_evaluation_differentiates(where: type[InForward]) -> None:
    task = where("autograd_sums")
    model = task.model()
    loader = BatchLoader(task, task.eval_data(), torch.device("cpu"), torch.float64)
    values = evaluate(task, model, loader, N, SerialCommunicator(), batch_size=3)
    assert values["loss"] == pytest.approx(truth(model)[0], rel=1e-12)
