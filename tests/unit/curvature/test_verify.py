"""What autograd or a replay gets wrong is found on the first solve; losses that take parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hfdist import HessianFree
from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.microbatch import from_parts
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.verify import Verifier
from hfdist.errors import TaskError

N = 5


class Net(nn.Module):
    """A network whose hidden layer goes through `f`; with a parameter of its own for losses."""

    def __init__(self, f: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.f = nn.Linear(3, 4), nn.Linear(4, 3), f
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (N,), generator=generator)


def problem_of(
    model: nn.Module, loss: Callable[[Any], Tensor], forward: Any = None, **settings: Any
) -> Problem:
    x, _ = data()
    role = [from_parts(forward or (lambda: model(x)), lambda z: (loss(z), 1.0), 0)]
    return Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        **settings,
    )


def ce(z: Tensor) -> Tensor:
    return F.cross_entropy(z, data()[1])


def columns(problem: Problem) -> Tensor:
    B = problem.curvature()
    eye = torch.eye(problem.numel, dtype=torch.float64)
    return torch.stack([B(e).clone() for e in eye], 1)


# -- losses that take parameters


FIFTH = torch.full((12,), 0.2, dtype=torch.float64)
TERMS: dict[str, tuple[Callable[[Net], Tensor], Callable[[Net], Tensor | None]]] = {
    # term of the loss -> what its curvature adds to the diagonal of `a.weight` (None: nothing)
    "l2": (lambda m: 0.1 * m.a.weight.pow(2).sum(), lambda m: FIFTH),
    "l2-by-mul": (lambda m: 0.1 * (m.a.weight * m.a.weight).sum(), lambda m: FIFTH),
    "l2-by-norm": (lambda m: 0.1 * m.a.weight.norm() ** 2, lambda m: FIFTH),
    "l2-by-mse": (
        lambda m: 1.2 * F.mse_loss(m.a.weight, torch.ones(4, 3, dtype=torch.float64)),
        lambda m: FIFTH,
    ),
    "l1": (lambda m: 0.1 * m.a.weight.abs().sum(), lambda m: None),
    "linear": (lambda m: 0.1 * m.a.weight.sum(), lambda m: None),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("engine", ["linearize", "double_backward", "recompute"])
def test_terms_of_parameters_are_in_gradient_and_product(name: str, engine: str) -> None:
    term, diagonal = TERMS[name]
    model = Net()
    problem = problem_of(
        model, lambda z: ce(z) + term(model), engine=ProductEngine(requested=engine)
    )
    _, g = problem.loss_and_gradient()
    tensors = list(model.parameters())
    x, _ = data()
    loss = ce(model(x)) + term(model)
    expected = torch.autograd.grad(loss, tensors, allow_unused=True)
    torch.testing.assert_close(g, dense.flat(expected, tensors), rtol=1e-12, atol=1e-14)

    f = dense.Function(outputs=lambda: [model(x)], loss=lambda z: (ce(z[0]), 1.0))
    G = dense.ggn([f], tensors)
    added = diagonal(model)
    if added is not None:
        start = 1  # after `scale`
        index = torch.arange(start, start + 12)
        G[index, index] += added.double()
    torch.testing.assert_close(columns(problem), G, rtol=1e-10, atol=1e-12)


# Losses of arguments that mix outputs with parameters: loss of (model, z), arguments, loss of the arguments.
def _squares(m: Net) -> Tensor:
    return 0.1 * m.a.weight.square().sum()


MIXED: dict[str, tuple[Callable[..., Tensor], Callable[..., list[Tensor]], Callable[..., Tensor]]] = {
    "temperature": (
        lambda m, z: ce(z * m.scale.exp()),
        lambda m, z: [z * m.scale.exp()],
        lambda a: ce(a),
    ),
    "temperature and L2": (
        lambda m, z: ce(z * m.scale.exp()) + _squares(m) + 0.2 * m.scale.square(),
        lambda m, z: [z * m.scale.exp(), m.a.weight.clone(), m.scale.clone()],
        lambda a, w, s: ce(a) + 0.1 * w.square().sum() + 0.2 * s.square(),
    ),
    "centers": (
        lambda m, z: ce(z) + 0.3 * (z - m.a.weight[data()[1], :3]).square().sum(),
        lambda m, z: [z.clone(), z - m.a.weight[data()[1], :3]],
        lambda a, d: ce(a) + 0.3 * d.square().sum(),
    ),
    "twice": (
        lambda m, z: ce(z * m.scale.exp()) + 0.2 * (z * m.scale.exp()).square().sum(),
        lambda m, z: [z * m.scale.exp(), z * m.scale.exp()],
        lambda a, b: ce(a) + 0.2 * b.square().sum(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("engine", ["linearize", "double_backward", "recompute"])
def test_arguments_that_mix_outputs_and_parameters_have_their_whole_matrix(
    name: str, engine: str
) -> None:
    model, (loss, arguments, of_arguments) = Net(), MIXED[name]
    requested = ProductEngine(requested=engine)  # type: ignore[arg-type]
    problem = problem_of(model, lambda z: loss(model, z), engine=requested)
    problem.loss_and_gradient()
    f = dense.Function(
        outputs=lambda: arguments(model, model(data()[0])), loss=lambda z: (of_arguments(*z), 1.0)
    )
    G = dense.ggn([f], list(model.parameters()))
    torch.testing.assert_close(columns(problem), G, rtol=1e-10, atol=1e-12)


DIRECT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "temperature": lambda m, z: ce(z * m.scale.exp()),
    "uncertainty": lambda m, z: ce(z) * torch.exp(-m.scale) + m.scale,
    "second-call": lambda m, z: ce(z) + F.mse_loss(m(data()[0] + 0.1), z),
    "only-a-second-call": lambda m, z: ce(m(data()[0] * 2.0)),
    "centers": lambda m, z: (z - m.a.weight[data()[1], :3]).square().sum(),
    "group-lasso": lambda m, z: ce(z) + m.a.weight.norm(dim=1).sum(),
    "target": lambda m, z: F.cross_entropy(z, (z * m.scale).softmax(1)),
}


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("by", ["parts", "acc_step"])
def test_gradients_are_whole_and_curvature_is_semidefinite(name: str, by: str) -> None:
    model, loss = Net(), DIRECT[name]
    tensors = list(model.parameters())
    x, y = data()
    g = torch.autograd.grad(loss(model, model(x)), tensors, allow_unused=True)
    if by == "acc_step":
        # With so much damping and no metric, a step goes along the gradient.
        optimizer = HessianFree(
            tensors,
            solver="cg",
            preconditioner="none",
            cg_max_iter=1,
            use_linesearch=False,
            damping=1e6,
            lr=1e-3,
        )
        before = ParameterVector(tensors).read()
        optimizer.acc_step(model, lambda z, _: loss(model, z), [(x, y)])
        moved = before - ParameterVector(tensors).read()
        torch.testing.assert_close(
            moved / moved.norm(),
            dense.flat(g, tensors) / dense.flat(g, tensors).norm(),
            rtol=1e-4,
            atol=1e-5,
        )
        return
    problem = problem_of(model, lambda z: loss(model, z))
    torch.testing.assert_close(
        problem.loss_and_gradient()[1], dense.flat(g, tensors), rtol=1e-12, atol=1e-14
    )
    G = columns(problem)
    torch.testing.assert_close(G, G.T, rtol=1e-9, atol=1e-12)
    if name != "target":  # which is not convex in the outputs
        assert float(torch.linalg.eigvalsh(G).min()) > -1e-10 * float(G.norm())


def test_a_loss_with_data_of_its_own_trains_with_the_default_solver() -> None:
    """It takes no part of the examples, which statistics of a metric are made of."""
    model = Net()
    x, y = data()
    optimizer = HessianFree(model.parameters())
    before = float(DIRECT["second-call"](model, model(x)).detach())
    after = optimizer.acc_step(model, lambda z, _: DIRECT["second-call"](model, z), [(x, y)])
    assert after < before


# -- recognised losses, changed afterwards


def halved_in_place(z: Tensor) -> Tensor:
    loss = ce(z)
    loss /= 2
    return loss


def masked_in_place(z: Tensor) -> Tensor:
    losses = F.cross_entropy(z, data()[1], reduction="none")
    losses[1] = 0
    losses *= torch.arange(1.0, N + 1, dtype=z.dtype)
    return losses.sum()


def writes_into_outputs(z: Tensor) -> Tensor:
    z[:, 0] = -3.0
    return ce(z)


def exp_in_place(z: Tensor) -> Tensor:
    return ce(z).exp_()


def one_call_an_example(z: Tensor) -> Tensor:
    """Several calls, each of which sees another piece of the outputs."""
    return torch.stack([F.cross_entropy(row, y) for row, y in zip(z.unbind(), data()[1])]).mean()


@pytest.mark.parametrize(
    "loss",
    [
        halved_in_place,
        masked_in_place,
        writes_into_outputs,
        exp_in_place,
        one_call_an_example,
    ],
    ids=lambda f: f.__name__,
)
def test_arithmetic_in_place_on_losses_and_outputs(loss: Any) -> None:
    model = Net()
    x, _ = data()
    problem = problem_of(model, loss)
    value, _ = problem.loss_and_gradient()
    assert value == pytest.approx(float(loss(model(x)).detach()), rel=1e-12)
    f = dense.Function(outputs=lambda: [model(x)], loss=lambda z: (loss(z[0].clone()), 1.0))
    G = dense.ggn([f], list(model.parameters()))
    torch.testing.assert_close(columns(problem), G, rtol=1e-9, atol=1e-12)


# -- the loss among the outputs


@pytest.mark.parametrize("form", ["with-logits", "alone", "one-an-example", "scaled"])
def test_a_loss_among_the_outputs_is_as_if_it_were_not_there(form: str) -> None:
    model = Net()
    x, y = data()

    def forward() -> Any:
        z = model(x)
        losses = F.cross_entropy(z, y, reduction="none")
        if form == "alone":
            return F.cross_entropy(z, y)
        return {"loss": losses if form == "one-an-example" else losses.mean(), "logits": z}

    def loss(outputs: Any) -> Tensor:
        value = outputs if form == "alone" else outputs["loss"]
        return value.mean() * (0.25 if form == "scaled" else 1.0)

    expected = problem_of(model, lambda z: loss({"loss": ce(z)}) if form != "alone" else ce(z))
    got = problem_of(model, loss, forward)
    for a, b in zip(got.loss_and_gradient(), expected.loss_and_gradient()):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(columns(got), columns(expected), rtol=1e-9, atol=1e-12)


def test_a_closure_that_returns_the_loss_with_the_outputs() -> None:
    final = []
    for beside in (False, True):
        model = Net()
        optimizer = HessianFree([*model.a.parameters(), *model.b.parameters()])

        def forward(model: Net = model, beside: bool = beside) -> tuple[Tensor, Any]:
            z = model(data()[0])
            loss = ce(z)
            return loss, {"loss": loss, "logits": z} if beside else z

        final.append([optimizer.step(forward) for _ in range(3)])
    assert final[1] == pytest.approx(final[0], rel=1e-9)


# -- paths that autograd loses


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class ByNumpy(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * x.cos().detach().numpy())


class WrongGradient(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 1.2 * g


def hooked(x: Tensor) -> Tensor:
    h = x.sin()
    h.register_hook(lambda g: 0.5 * g)
    return h


PRODUCT_WRONG = {"once": Once.apply, "numpy": ByNumpy.apply}
GRADIENT_WRONG = {
    "detach": lambda x: x + x.detach() ** 2,
    "numpy": lambda x: x + torch.from_numpy(x.detach().numpy() ** 2),
    "hook": hooked,
    "function": WrongGradient.apply,
}


@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
@pytest.mark.parametrize("name", PRODUCT_WRONG)
def test_products_that_double_backward_loses_are_refused(name: str, curvature_opt: Any) -> None:
    problem = problem_of(Net(PRODUCT_WRONG[name]), ce, curvature_opt=curvature_opt)
    with pytest.raises(TaskError, match=r"custom autograd functions|once_differentiable"):
        problem.loss_and_gradient()


@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
@pytest.mark.parametrize("name", GRADIENT_WRONG)
def test_a_gradient_that_is_not_the_losss_is_an_error(name: str, curvature_opt: Any) -> None:
    model = Net(GRADIENT_WRONG[name])
    with pytest.raises(TaskError, match="gradient and loss disagree"):
        problem_of(model, ce, curvature_opt=curvature_opt).loss_and_gradient()
    off = ProductEngine(verifier=Verifier(mode="off"))
    problem_of(model, ce, curvature_opt=curvature_opt, engine=off).loss_and_gradient()


def test_a_refused_step_leaves_the_parameters() -> None:
    model = Net(hooked)
    x, y = data()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = HessianFree(model.parameters())
    with pytest.raises(TaskError, match="no step was taken"):
        optimizer.acc_step(model, F.cross_entropy, [(x, y)])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_loses_nothing(use_reentrant: bool, frozen: bool) -> None:
    """A reentrant checkpoint below a frozen part has no gradient by itself."""
    plain, lean = Net(), Net()
    for model in (plain, lean):
        model.a.requires_grad_(not frozen)
    x, _ = data()

    def forward() -> Tensor:
        h = lean.a(x)
        return checkpoint(lambda h: lean.b(torch.tanh(h)), h, use_reentrant=use_reentrant)

    found = []
    for model, run in ((plain, None), (lean, forward)):
        role = [from_parts(run or (lambda: plain(x)), lambda z: (ce(z), 1.0), 0)]
        problem = Problem(
            params=ParameterVector(p for p in model.parameters() if p.requires_grad),
            roles=Roles(gradient=role, curvature=role, loss=role),
        )
        _, g = problem.loss_and_gradient()
        found.append((g, columns(problem)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


BRANCHES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "cond": (
        lambda h: torch.cond(h.sum() > 100, torch.cos, lambda t: t.sin() + t, (h,)),
        lambda h: h.sin() + h,
    ),
    "while_loop": (
        lambda h: while_loop(lambda k, _: k < 3, lambda k, t: (k + 1, t.sin() + t), (ZERO, h))[1],
        lambda h: (g := (f := h.sin() + h).sin() + f).sin() + g,
    ),
}
ZERO = torch.tensor(0)


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_of_torch_are_taken_as_pythons(name: str) -> None:
    """torch compiles them, and what it compiles has no second derivative."""
    found = []
    for f in BRANCHES[name]:
        problem = problem_of(Net(f), ce)
        _, g = problem.loss_and_gradient()
        found.append((g, columns(problem), *problem.losses([(-0.1, g)])))
        assert problem.product_engine == "linearize"
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-14)
    for a, b in zip(found[0][:2], found[1][:2]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_padding_row_raises_no_alarm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight[0] = 1.0
    ids = torch.tensor([[0, 1], [2, 0], [3, 4], [1, 1], [0, 2]])
    problem_of(model, ce, lambda: model(ids)).loss_and_gradient()


def mask_hook(model: Net) -> None:
    model.a.weight.register_hook(lambda g: g * torch.eye(4, 3, dtype=g.dtype))


@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
def test_a_hook_that_drops_entries_of_a_gradient_is_an_error(curvature_opt: Any) -> None:
    model = Net()
    mask_hook(model)
    with pytest.raises(TaskError, match="gradient and loss disagree"):
        problem_of(model, ce, curvature_opt=curvature_opt).loss_and_gradient()


@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
def test_a_gradient_that_is_a_little_off_is_an_error(curvature_opt: Any) -> None:
    def slightly(x: Tensor) -> Tensor:
        h = x.sin()
        h.register_hook(lambda g: 1.0005 * g)
        return h

    with pytest.raises(TaskError, match="gradient and loss disagree"):
        problem_of(Net(slightly), ce, curvature_opt=curvature_opt).loss_and_gradient()


def test_what_does_not_fit_the_memory_is_checked_too() -> None:
    engine = ProductEngine(memory_budget=1)
    with pytest.raises(TaskError, match=r"custom autograd functions|once_differentiable"):
        problem_of(Net(ByNumpy.apply), ce, engine=engine).loss_and_gradient()


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": lambda h: F.leaky_relu(h, 0.1),
    "clamp": lambda h: h.clamp(min=0.0),
    "where": lambda h: torch.where(h > 0, h, 0.0 * h),
    "hardtanh": lambda h: F.hardtanh(h, 0.0, 1.0),
    "maximum": lambda h: torch.maximum(h, torch.zeros_like(h)),
}


@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KINKS)
def test_a_kink_at_the_parameters_raises_no_alarm(
    name: str, dtype: torch.dtype, curvature_opt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Zero inputs and zero biases: half of what comes to the function is exactly zero."""
    model = Net(KINKS[name]).to(dtype)
    nn.init.zeros_(model.a.bias)
    x = data()[0].to(dtype)
    x[::2] = 0.0
    problem_of(model, ce, lambda: model(x), curvature_opt=curvature_opt).loss_and_gradient()
    assert not caplog.records


def test_a_saturated_softmax_raises_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """Its Hessian is nothing but rounding."""
    problem_of(Net(), lambda z: ce(1e3 * z)).loss_and_gradient()
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(50.0)
    problem_of(model, ce).loss_and_gradient()
    assert not caplog.records


# -- what is checked when


def test_checks_come_again_when_other_operations_are_replayed() -> None:
    model, engine = Net(), ProductEngine()
    counts = []
    for f in (torch.tanh, torch.tanh, torch.sigmoid, torch.sigmoid):
        model.f = f
        problem = problem_of(model, ce, engine=engine)
        problem.loss_and_gradient()
        counts.append(engine.verifier._num_checks)
    assert counts == [1, 1, 2, 2]


def test_a_fallback_is_told_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    model, engine = Net(lambda x: x.view_as(x).mul_(2.0).tanh()), ProductEngine()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            problem_of(model, ce, engine=engine).loss_and_gradient()
    assert len(caplog.messages) == 1
    assert "mul_" in caplog.messages[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten()), "sparse=False"),
        (lambda: nn.EmbeddingBag(5, 3), "nn.Embedding and a sum or mean"),
    ],
)
def test_errors_name_the_fix(make: Any, message: str) -> None:
    model = make().double()
    ids = torch.arange(N)[:, None]
    with pytest.raises(TaskError, match=message):
        problem_of(model, ce, lambda: model(ids)).loss_and_gradient()


def test_complex_parameters_are_told() -> None:
    with pytest.raises(ValueError, match="view_as_real"):
        ParameterVector([torch.zeros(2, dtype=torch.complex128, requires_grad=True)])


@pytest.mark.parametrize("loss", [lambda z: ce(z).detach(), lambda z: ce(z.detach())])
def test_a_loss_without_a_graph_is_told(loss: Any) -> None:
    model = Net()
    with pytest.raises(TaskError, match="without detach, item or no_grad"):
        problem_of(model, loss).loss_and_gradient()
    with pytest.raises(TaskError, match="without detach, item or no_grad"):
        HessianFree(model.parameters()).step(lambda: (loss(z := model(data()[0])), z))


def test_ctc_names_the_fix() -> None:
    model = Net()
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        lengths = torch.tensor([4, 4]), torch.tensor([1, 1])
        return F.ctc_loss(z.log_softmax(2), torch.tensor([[1], [2]]), *lengths)

    with pytest.raises(TaskError, match="CTC loss has no second derivative"):
        problem_of(model, loss, lambda: model(x)).loss_and_gradient()


def test_an_overwritten_value_is_named_with_its_fix() -> None:
    layer = nn.Linear(3, 3)

    def closure() -> tuple[Tensor, Tensor]:
        h = layer(torch.ones(2, 3)).sigmoid()
        h += 1.0  # sigmoid's backward pass reads h
        return h.square().mean(), h

    with pytest.raises(TaskError, match=r"in place overwrites .* write h = h \+ x"):
        HessianFree(layer.parameters()).step(closure)
