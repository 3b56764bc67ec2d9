"""What every preconditioner of the table promises."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import torch
from cases import named, rows
from torch import Tensor

from hfdist.curvature.example_signs import example_seeds
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Overrides, Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.preconditioners import PRECONDITIONERS, Context, make_preconditioner
from hfdist.optim.options import HFOptions, PreconditionerOptions

NAMES = [name for name in PRECONDITIONERS if name != "none"]
MODELS = [
    "linear-ce",
    "linear-mse",
    "conv",
    "batch-norm-train",
    "embedding-tied",
    "encoder-padded",
    "lstm",
]


def problem_of(case_name: str, name: str, sizes: tuple[int, ...], scale: float = 1.0) -> Problem:
    case = named([case_name])[0]
    model, batch, task, low, parts = case.model(), case.data(), case.task(), 0, []
    if scale != 1.0:
        own = task.loss

        def scaled(outputs: Any, b: Any) -> Any:
            loss = own(outputs, b)
            return (loss[0] * scale, loss[1]) if isinstance(loss, tuple) else loss * scale

        task.loss = scaled
    for size in sizes:
        part = rows(batch, low, low + size)
        seeds = example_seeds(0, torch.arange(low, low + size))
        parts.append((from_task(task, model, part, 0, seeds), part))
        low += size
    role = [microbatch for microbatch, _ in parts]
    options = HFOptions(preconditioner=name, preconditioner_examples=1.0)
    context = Context(task=task, model=model, gradient=parts, options=options)
    return Problem(
        params=ParameterVector(p for p in model.parameters() if p.requires_grad),
        roles=Roles(gradient=role, curvature=role, loss=role),
        reduction=case.reduction,
        frozen=FixedRandomness(torch.device("cpu"), model),
        overrides=Overrides(preconditioner=make_preconditioner(context)),
    )


def dense(problem: Problem, damping: float | None) -> Tensor:
    problem.loss_and_gradient()
    M = problem.preconditioner(damping)
    assert M is not None
    eye = torch.eye(problem.numel, dtype=problem.params.dtype)
    return torch.stack([M(row).clone() for row in eye])


def metric(problem: Problem) -> Tensor:
    """C, whose inverse `preconditioner(None)` gives."""
    return torch.linalg.inv(dense(problem, None).double())


def test_the_option_names_exactly_the_table() -> None:
    names = get_args(get_type_hints(PreconditionerOptions)["preconditioner"])
    assert set(names) == set(PRECONDITIONERS)
    context = Context(task=None, model=None, gradient=[], options=HFOptions())  # type: ignore[arg-type]
    assert make_preconditioner(context) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", MODELS)
def test_it_is_symmetric_and_positive_definite(case: str, name: str) -> None:
    for damping in (0.3, None):
        M = dense(problem_of(case, name, (6,)), damping)
        torch.testing.assert_close(M, M.T, rtol=1e-5, atol=1e-6)
        assert float(torch.linalg.eigvalsh((M + M.T).double() / 2).min()) > 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["linear-ce", "embedding-tied", "conv", "lstm"])
def test_microbatches_change_nothing(case: str, name: str) -> None:
    for damping in (0.3, None):
        whole, cut = (dense(problem_of(case, name, sizes), damping) for sizes in ((6,), (4, 2)))
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["linear-ce", "embedding-tied", "conv", "lstm"])
def test_a_factor_on_the_loss_is_one_on_the_metric(case: str, name: str) -> None:
    C, times_1000 = (metric(problem_of(case, name, (4, 2), scale)) for scale in (1.0, 1000.0))
    torch.testing.assert_close(times_1000, 1000.0 * C, rtol=1e-6, atol=1e-6 * float(C.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_the_model_as_it_was(name: str) -> None:
    problem = problem_of("batch-norm-train", name, (6,))
    problem.loss_and_gradient()
    before = problem.params.read()
    state = torch.get_rng_state()
    assert problem.preconditioner(0.3) is not None
    assert torch.equal(problem.params.read(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(t.grad is None for t in problem.params.tensors)
