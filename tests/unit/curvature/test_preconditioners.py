"""The empirical Fisher diagonal against a loop over the examples, by each of its ways."""

from __future__ import annotations

import copy
import logging
from typing import Any

import dense
import pytest
import torch
from cases import CASES, Case, named, num_rows, rows
from torch import Tensor, nn

from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Overrides, Problem, Regularisation, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.preconditioners import (
    Context,
    DiagonalPreconditioner,
    backpack_squares,
    empirical_fisher_diagonal,
    make_preconditioner,
    sum_of_squared_gradients,
)
from hfdist.curvature.preconditioners import empirical_fisher as empirical_fisher_module
from hfdist.optim.options import HFOptions

SINGLE = [c for c in CASES if not c.coupled and not c.random]
"""Cases whose examples have gradients of their own, the same in any company."""


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def by_examples(case: Case, model: nn.Module) -> Tensor:
    """sum_i g_i^2, an example at a time."""
    batch, params = case.data(), trainable(model)
    total = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    for i in range(num_rows(batch)):
        f = case.function(model, rows(batch, i, i + 1), seed=0)
        loss_sum, _ = f.loss(f.outputs())
        if loss_sum.requires_grad:
            total += dense.flat(
                torch.autograd.grad(loss_sum, params, allow_unused=True), params
            ).square()
    return total


def squares(case: Case, model: nn.Module, **settings: Any) -> Tensor:
    task = case.task()
    return sum_of_squared_gradients(
        ParameterVector(trainable(model)),
        model,
        task.loss,
        task.forward,
        case.data(),
        reduction=case.reduction,
        **settings,
    ).double()


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_it_is_the_sum_of_squared_example_gradients(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    model = case.model()
    expected = by_examples(case, model)
    tolerance = 1e-9 if case.double else 1e-4
    empirical_fisher_module._warn_of_loop.cache_clear()
    with caplog.at_level(logging.WARNING):
        got = squares(case, model)
        # A bound on memory changes the way, not the result.
        parts = squares(case, model, max_bytes=3 * 8 * len(expected), use_backpack=False)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 1e-3)
    torch.testing.assert_close(parts, expected, rtol=tolerance, atol=tolerance * 1e-3)
    assert not caplog.records, "every case is vectorised"


@pytest.mark.parametrize(
    "case",
    named(["linear-ce", "linear-mse", "sum-of-losses", "conv", "batch-norm-train",
           "batch-norm-eval", "dropout"]),
    ids=lambda case: case.name,
)  # fmt: skip
def test_backpack_and_torch_func_agree(case: Case) -> None:
    model = case.model()
    assert backpack_squares.is_supported(model)
    torch.manual_seed(5)
    first = squares(case, model)
    torch.manual_seed(5)
    second = squares(case, model, use_backpack=False)
    assert float(first.abs().sum()) > 0
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["residual-train", "encoder-dropout", "lstm", "attention"])
def test_backpack_is_not_asked_for_what_it_does_not_cover(name: str) -> None:
    assert not backpack_squares.is_supported(named([name])[0].model())


def test_batch_norm_in_training_keeps_the_batch_statistics_fixed() -> None:
    """The g_i add up to the gradient of the batch with its statistics held."""
    case = named(["batch-norm-train"])[0]
    model, (x, y) = case.model(), case.data()
    h = model[0](x)
    fixed = copy.deepcopy(model).eval()
    fixed[1].running_mean.copy_(h.mean(0).detach())
    fixed[1].running_var.copy_(h.var(0, correction=0).detach())
    expected = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(fixed(x[i : i + 1]), y[i : i + 1])
        expected += dense.flat(
            torch.autograd.grad(loss, list(fixed.parameters())), list(fixed.parameters())
        ).square()
    torch.testing.assert_close(squares(case, model), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_leaves_no_trace(case: Case) -> None:
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    hooks = [
        len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks)
        for m in model.modules()
    ]
    state = torch.get_rng_state()
    for use_backpack in (True, False):
        squares(case, model, use_backpack=use_backpack)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert hooks == [
        len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks)
        for m in model.modules()
    ]
    assert all(p.grad is None for p in model.parameters())
    assert not any(hasattr(p, "sum_grad_squared") for p in model.parameters())
    assert model.training is case.training


def test_a_model_that_torch_func_cannot_vectorise_is_looped_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([(self.a if r.sum() > 0 else self.b)(r[None]) for r in x])

    case = Case(
        name="branch", make=Branch, batch=named(["linear-ce"])[0].batch, loss=named(["linear-ce"])[0].loss
    )  # fmt: skip
    model = case.model()
    with caplog.at_level(logging.WARNING):
        got = squares(case, model)
    assert "one backward pass an example" in caplog.text
    torch.testing.assert_close(got, by_examples(case, model), rtol=1e-9, atol=1e-15)


def test_the_function_of_a_loop_of_ones_own_normalises_as_asked() -> None:
    case = named(["linear-ce"])[0]
    model, (x, y) = case.model(), case.data()
    expected = by_examples(case, model)
    mean = empirical_fisher_diagonal(model, nn.functional.cross_entropy, x, y, "mean")
    torch.testing.assert_close(mean, expected / len(x), rtol=1e-9, atol=1e-15)
    with pytest.raises(ValueError, match="median"):
        empirical_fisher_diagonal(model, nn.functional.cross_entropy, x, y, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["linear-ce", "encoder-padded", "lstm", "residual-eval"])
@pytest.mark.parametrize("sizes", [(6,), (4, 2)], ids=["whole", "microbatched"])
def test_the_preconditioner_of_a_step(name: str, sizes: tuple[int, ...]) -> None:
    """M^-1 = (sum_i g_i^2 / weight + l2 + damping)^-xi, whatever the microbatches."""
    case = named([name])[0]
    model, batch, task, low, parts = case.model(), case.data(), case.task(), 0, []
    for size in sizes:
        part = rows(batch, low, low + size)
        parts.append((from_task(task, model, part, seed=low), part))
        low += size
    role = [microbatch for microbatch, _ in parts]
    options = HFOptions(
        preconditioner="empirical_fisher", weight_decay=0.1, preconditioner_exponent=0.6
    )
    problem = Problem(
        params=ParameterVector(trainable(model)),
        roles=Roles(gradient=role, curvature=role, loss=role),
        reduction="mean",
        regularisation=Regularisation(weight_decay=0.1),
        frozen=FixedRandomness(torch.device("cpu"), model),
        overrides=Overrides(
            preconditioner=make_preconditioner(
                Context(task=task, model=model, gradient=parts, options=options)
            )
        ),
    )
    problem.loss_and_gradient()
    M = problem.preconditioner(0.5)
    assert M is not None
    f = case.function(model, batch, seed=0)
    _, weight = f.loss(f.outputs())
    expected = (by_examples(case, model) / weight + 0.1 + 0.5) ** -0.6
    torch.testing.assert_close(M(torch.ones_like(expected)), expected, rtol=1e-9, atol=1e-12)


def test_diagonal_preconditioner() -> None:
    d = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    v = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    M = DiagonalPreconditioner(d, 0.5)
    torch.testing.assert_close(M(v), v / (d + 0.5) ** 0.75)
    out = torch.empty_like(v)
    assert M(v, out) is out
    assert torch.isfinite(DiagonalPreconditioner(d, 0.0)(v)).all(), "an unused parameter"
    with pytest.raises(ValueError, match="at least 0"):
        DiagonalPreconditioner(d, -1.0)
