"""Every way to compute a product gives the same product; what is kept, and who decides."""

from __future__ import annotations

import gc
import logging
from typing import Any

import dense
import pytest
import torch
from cases import CASES, Case, named, rows
from passes import passes_of
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.linearize import Recorder, Unsupported
from hfdist.curvature.microbatch import LossTraits, from_closure, from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.verify import Verifier
from hfdist.hessian_free import HessianFree

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DOUBLE_BACKWARD_ONLY: set[str] = set()
"""Cases that cannot be replayed on tangents."""
CLOSED_FORM = {
    "linear-ce", "linear-mse", "linear-bce", "sum-of-losses", "ce-weights-smoothing-ignored",
    "ce-probabilities", "bce-weights", "embedding-tied", "encoder-padded",
}  # fmt: skip


def unchecked(**settings: Any) -> ProductEngine:
    """Without the checks of a first step, whose passes would be counted."""
    return ProductEngine(verifier=Verifier(mode="off"), **settings)


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def problem_of(
    case: Case, engine: ProductEngine, sizes: tuple[int, ...] = (6,), **settings: Any
) -> Problem:
    model, batch, low, role = case.model(), case.data(), 0, []
    for size in sizes:
        role.append(from_task(case.task(), model, rows(batch, low, low + size), 7 + low))
        low += size
    return Problem(
        params=ParameterVector(trainable(model)),
        roles=Roles(gradient=role, curvature=role, loss=role),
        frozen=FixedRandomness(torch.device("cpu"), model),
        engine=engine,
        **settings,
    )


def products(problem: Problem, number: int = 2) -> Tensor:
    problem.loss_and_gradient()
    B = problem.curvature()
    generator = torch.Generator().manual_seed(3)
    dtype = problem.params.dtype
    vs = [torch.randn(problem.numel, dtype=dtype, generator=generator) for _ in range(number)]
    return torch.stack([B(v).clone() for v in vs])


@by_name
def test_engines_agree(case: Case) -> None:
    reference = products(problem_of(case, ProductEngine(requested="double_backward")))
    tolerance = 1e-10 if case.double else 1e-5
    for engine in ("linearize", "recompute"):
        got = products(problem_of(case, ProductEngine(requested=engine)))
        torch.testing.assert_close(
            got, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max() + 1e-3)
        )


@by_name
def test_every_case_is_linearized(case: Case) -> None:
    model = case.model()
    recorder = Recorder(trainable(model))
    with FixedRandomness(torch.device("cpu"), model).evaluation(0), recorder:
        z = case.split(case.task().forward(model, case.data()))
    if case.name in DOUBLE_BACKWARD_ONLY:
        with pytest.raises(Unsupported):
            recorder.program(z)
    else:
        assert recorder.program(z).steps


@by_name
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_what_is_recomputed_has_the_same_bits(case: Case, curvature: Any) -> None:
    """Memory decides what is kept, and memory must not decide what is computed."""
    if curvature == "hessian" and not case.hessian:
        pytest.skip("torch's second derivatives are wrong, and refused")
    settings = {"curvature_opt": curvature}
    kept = products(problem_of(case, ProductEngine(memory_budget=2**40), (2, 2, 2), **settings))
    for budget in (0, 1000):
        again = problem_of(case, unchecked(memory_budget=budget), (2, 2, 2), **settings)
        passes = passes_of(again)
        assert torch.equal(products(again), kept)
        if budget == 0:
            assert len(passes) == 3 * (1 + 2)


def test_a_budget_keeps_as_many_graphs_as_fit() -> None:
    case = named(["linear-ce"])[0]
    numbers = []
    for budget in (0, 1000, 2**40):
        problem = problem_of(case, unchecked(memory_budget=budget), (2, 2, 2))
        passes = passes_of(problem)
        products(problem, number=5)
        numbers.append(len(passes))
    assert numbers[0] == 18
    assert numbers[2] == 3
    assert 3 < numbers[1] < 18


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_hessians_in_closed_form(case: Case) -> None:
    model, batch = case.model(), case.data()
    microbatch = from_task(case.task(), model, batch, seed=0)
    with FixedRandomness(torch.device("cpu"), model).evaluation(0):
        e = microbatch.evaluate(LossTraits(), None)
    H = e.closed_form()
    if case.name in CLOSED_FORM:
        assert H is not None
    if case.name in {"summed-bce", "huber", "two-losses", "linear-loss"}:
        assert H is None
    if H is None:
        return
    generator = torch.Generator().manual_seed(1)
    v = [torch.randn(z.shape, dtype=z.dtype, generator=generator) for z in e.loss_inputs]
    leaves = [z.detach().clone().requires_grad_() for z in e.loss_inputs]
    f = case.function(model, batch, seed=0)
    if len(case.split(case.task().forward(model, batch))) != len(leaves):
        return
    explicit, _ = dense.loss_hessian(f, leaves)
    expected = explicit @ dense.flat(v, leaves)
    torch.testing.assert_close(dense.flat(H(v), leaves), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_in_all_its_forms(reduction: Any, smoothing: float, weighted: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    targets = torch.randint(4, (5, 2))
    targets[0, 1] = -100
    factors = torch.rand(5, 2, dtype=torch.float64)
    weights = torch.rand(4, dtype=torch.float64) if weighted else None

    def loss(z: Tensor, batch: Any) -> Any:
        value = nn.functional.cross_entropy(
            z.transpose(1, 2), targets, weights, reduction=reduction, label_smoothing=smoothing
        )
        return (value * factors).sum() if reduction == "none" else value * 3.0

    case = Case(name="ce", make=lambda: model, batch=lambda: (x, targets), loss=loss)
    f = case.function(model, (x, targets), seed=0)
    e = from_task(case.task(), model, (x, targets), seed=0).evaluate(LossTraits(), None)
    H = e.closed_form()
    assert H is not None
    explicit, _ = dense.loss_hessian(f, e.loss_inputs)
    v = [torch.randn_like(z) for z in e.loss_inputs]
    torch.testing.assert_close(dense.flat(H(v), v), explicit @ dense.flat(v, v))


def test_shifted_tokens_are_seen_through() -> None:
    """logits[:, :-1] against ids[:, 1:], as causal language models do."""
    model = nn.Linear(3, 5).double()
    x, ids = torch.randn(2, 4, 3, dtype=torch.float64), torch.randint(5, (2, 4))

    def loss(z: Tensor, batch: Any) -> Tensor:
        shifted = z[..., :-1, :].contiguous()
        return nn.functional.cross_entropy(shifted.view(-1, 5), ids[..., 1:].reshape(-1))

    case = Case(name="shift", make=lambda: model, batch=lambda: (x, ids), loss=loss)
    e = from_task(case.task(), model, (x, ids), seed=0).evaluate(LossTraits(), None)
    H = e.closed_form()
    assert H is not None
    explicit, _ = dense.loss_hessian(case.function(model, (x, ids), 0), e.loss_inputs)
    v = [torch.randn_like(z) for z in e.loss_inputs]
    torch.testing.assert_close(dense.flat(H(v), v), explicit @ dense.flat(v, v))


class Square(torch.autograd.Function):
    """A user's own operation, invisible below autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OwnOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h + Square.apply(h))


class WritesIntoAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        h[:, :2] = self.a(x)[:, 2:]
        return self.b(torch.tanh(h))


class Overwrites(nn.Module):
    """An operation overwrites what an earlier one's derivative needs, which autograd does not (y * c
    needs c alone)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        c = torch.ones(4, dtype=x.dtype)
        h = self.a(x) * c.exp()
        h.add_(1.0).mul_(0.5)
        return self.b(h.sigmoid_())


@pytest.mark.parametrize("make", [OwnOperation, WritesIntoAView, Overwrites])
@pytest.mark.parametrize("engine", ["linearize", "recompute"])
def test_what_cannot_be_replayed_is_noticed(make: Any, engine: str) -> None:
    case = Case(
        name="own", make=make, batch=named(["linear-ce"])[0].batch, loss=named(["linear-ce"])[0].loss
    )  # fmt: skip
    problem = problem_of(case, ProductEngine(requested=engine))
    got = products(problem)
    model = case.model()
    G = dense.ggn([case.function(model, case.data(), 0)], trainable(model))
    generator = torch.Generator().manual_seed(3)
    for k in range(2):
        v = torch.randn(problem.numel, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(got[k], G @ v, rtol=1e-10, atol=1e-12)


def test_recording_says_why_it_failed() -> None:
    model, x = OwnOperation().double(), torch.randn(2, 3, dtype=torch.float64)
    recorder = Recorder(list(model.parameters()))
    with recorder:
        z = model(x)
    with pytest.raises(Unsupported, match="cannot be watched"):
        recorder.program([z])


def test_detached_values_have_no_tangent() -> None:
    model, x = nn.Linear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64)
    recorder = Recorder(list(model.parameters()))
    with recorder:
        h = model(x)
        with torch.no_grad():
            scale = h.abs().sum()
        z = h * h.detach() / scale
    v = [torch.randn_like(p) for p in model.parameters()]
    (Jv,) = recorder.program([z])(v)
    f = dense.jacobian(z, list(model.parameters())) @ dense.flat(v, v)
    torch.testing.assert_close(Jv.reshape(-1), f)


@pytest.mark.parametrize("engine", ["linearize", "recompute"])
def test_an_engine_that_is_wrong_is_replaced(
    engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hfdist.curvature.linearize import rules

    case = named(["linear-ce"])[0]
    right = products(problem_of(case, ProductEngine(requested="double_backward")))
    wrong = rules.RULES["aten::tanh"]
    monkeypatch.setitem(
        rules.RULES, "aten::tanh", lambda call: lambda t, free: 1.1 * wrong(call)(t, free)
    )
    problem = problem_of(case, ProductEngine(requested=engine))
    with caplog.at_level(logging.WARNING):
        got = products(problem)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-14)
    assert len(caplog.messages) == 1
    assert "linearize are not used" in caplog.text
    if engine == "linearize":
        assert problem.product_engine == "double_backward"


@pytest.mark.parametrize("engine", ["linearize", "recompute"])
def test_forward_passes_are_not_repeated(engine: str) -> None:
    case = named(["residual-train"])[0]
    problem = problem_of(case, unchecked(requested=engine))
    passes = passes_of(problem)
    products(problem, number=4)
    assert len(passes) == (1 if engine == "linearize" else 5)


@pytest.mark.parametrize("engine", ["linearize", "double_backward", "recompute"])
def test_closures_have_every_engine(engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

    def forward() -> tuple[Tensor, Tensor]:
        z = model(x)
        return (z - y).pow(2).sum(1).mean(), z

    role = [from_closure(forward, 0)]
    problem = Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        engine=ProductEngine(requested=engine),
    )
    z = model(x)
    J = dense.jacobian(z, list(model.parameters()))
    got = products(problem)
    generator = torch.Generator().manual_seed(3)
    for k in range(2):
        v = torch.randn(problem.numel, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(got[k], J.T @ (2 / 5 * (J @ v)), rtol=1e-10, atol=1e-12)


def test_a_compiled_model_is_seen_as_it_was_written() -> None:
    """Compiled code has no second derivatives."""
    losses = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(2, (8,))
        function = torch.compile(model) if is_compiled else model
        optimizer = HessianFree(model.parameters(), cg_max_iter=5)

        def forward(
            function: Any = function, x: Tensor = x, y: Tensor = y
        ) -> tuple[Tensor, Tensor]:
            z = function(x)
            return nn.functional.cross_entropy(z, y), z

        losses.append([optimizer.step(forward) for _ in range(3)])
        assert optimizer.report is not None
        assert optimizer.report.product_engine == "linearize"
    assert losses[0] == losses[1]


def test_activation_checkpointing_composes() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)
    )
    model.double()
    case = named(["linear-ce"])[0]

    def forward(m: Any, batch: Any) -> Tensor:
        return m[2](checkpoint(m[1], m[0](batch[0]), use_reentrant=False))

    plain = Case(name="plain", make=lambda: model, batch=case.batch, loss=case.loss)
    lean = Case(name="lean", make=lambda: model, batch=case.batch, loss=case.loss, forward=forward)
    expected = products(problem_of(plain, ProductEngine()))
    for engine in ("linearize", "recompute", "double_backward"):
        got = products(problem_of(lean, ProductEngine(requested=engine)))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@by_name
def test_products_leave_no_cycles_behind(case: Case) -> None:
    """A graph in a reference cycle would live until the garbage collector comes by."""
    problem = problem_of(case, ProductEngine(requested="recompute"))
    products(problem)  # what is made once and for all
    gc.disable()
    gc.freeze()  # all that there is by now is not looked at: it would take seconds
    try:
        products(problem)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [o for o in gc.garbage if isinstance(o, (Tensor, Recorder))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


def single(t: Any) -> Any:
    return t.float() if isinstance(t, Tensor) and t.is_floating_point() else t


@by_name
@pytest.mark.parametrize("engine", ["linearize", "double_backward", "recompute"])
def test_products_under_autocast(case: Case, engine: str) -> None:
    """Loss and gradient keep their bits, products are those of rounded layers."""
    if case.name == "mixed-dtypes":
        pytest.skip("its float64 layer does not take what autocast makes")
    model, batch = case.model().float(), tree_map(single, case.data())
    role = [from_task(case.task(), model, batch, 7)]

    def problem(**settings: Any) -> Problem:
        return Problem(
            params=ParameterVector(trainable(model)),
            roles=Roles(gradient=role, curvature=role, loss=role),
            frozen=FixedRandomness(torch.device("cpu"), model),
            engine=ProductEngine(requested=engine),
            **settings,
        )

    exact, cast = problem(), problem(autocast=torch.bfloat16)
    loss, gradient = exact.loss_and_gradient()
    cast_loss, cast_gradient = cast.loss_and_gradient()
    assert loss == cast_loss
    assert torch.equal(gradient, cast_gradient)
    v = torch.randn(exact.numel, generator=torch.Generator().manual_seed(3))
    reference, got = exact.curvature()(v).clone(), cast.curvature()(v)
    assert got.dtype == reference.dtype
    assert float((got - reference).norm()) <= 0.08 * float(reference.norm()) + 1e-6
