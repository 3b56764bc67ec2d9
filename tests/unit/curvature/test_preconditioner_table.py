"""What every preconditioner of the table promises."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from cases import Case, ce, classes, named, normal, rows
from torch import Tensor, nn

from hfdist.curvature.example_signs import example_seeds
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.kronecker import blocks
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Overrides, Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.preconditioners import PRECONDITIONERS, Context, make_preconditioner
from hfdist.curvature.preconditioners.memory import PreconditionerMemory
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
EVERY_LAYER = ["embedding-tied", "conv"]
FOLLOWS_LAYERS = ["auto", "kfac", "ekfac", "ggn_diagonal", "empirical_fisher"]
"""Metrics in which other units of a layer's weights change nothing."""


def problem_of(
    case: str | Case,
    name: str,
    sizes: tuple[int, ...] = (6,),
    scale: float = 1.0,
    model: nn.Module | None = None,
    memory: PreconditionerMemory | None = None,
    **changes: Any,
) -> Problem:
    case = named([case])[0] if isinstance(case, str) else case
    batch, task, low, parts = case.data(), case.task(), 0, []
    model = case.model() if model is None else model
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
    options = HFOptions(preconditioner=name, **{"preconditioner_examples": 1.0, **changes})
    context = Context(
        task=task,
        model=model,
        gradient=parts,
        options=options,
        memory=memory or PreconditionerMemory(),
    )
    return Problem(
        params=ParameterVector(p for p in model.parameters() if p.requires_grad),
        roles=Roles(gradient=role, curvature=role, loss=role),
        reduction=case.reduction,
        frozen=FixedRandomness(torch.device("cpu"), model),
        overrides=Overrides(preconditioner=make_preconditioner(context)),
    )


def built(
    case: str | Case, name: str, damping: float | None, **arguments: Any
) -> tuple[Problem, Any]:
    """A preconditioner of a step after another one, whose products it may have kept."""
    memory = PreconditionerMemory()
    for _ in range(2):
        problem = problem_of(case, name, memory=memory, **arguments)
        problem.loss_and_gradient()
        M = problem.preconditioner(damping)
        B = problem.curvature()
        for v in probes(problem.numel, 3):
            B(v.to(problem.params.dtype))
    assert M is not None
    return problem, M


def probes(n: int, number: int = 4) -> Tensor:
    return torch.randn(number, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def dense(case: str | Case, name: str, damping: float | None, **arguments: Any) -> Tensor:
    """The matrix that a preconditioner multiplies with."""
    problem, M = built(case, name, damping, **arguments)
    eye = torch.eye(problem.numel, dtype=problem.params.dtype)
    return torch.stack([M(row).clone() for row in eye])


def applied(case: str | Case, name: str, damping: float | None, **arguments: Any) -> Tensor:
    """Its products with some vectors."""
    problem, M = built(case, name, damping, **arguments)
    return torch.stack([M(v.to(problem.params.dtype)).clone() for v in probes(problem.numel)])


def assert_near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * float(b.abs().max()))


def test_the_option_names_exactly_the_table() -> None:
    names = get_args(get_type_hints(PreconditionerOptions)["preconditioner"])
    assert set(names) == set(PRECONDITIONERS)
    assert make_preconditioner(Context(options=HFOptions(preconditioner="none"))) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", MODELS)
def test_it_is_symmetric_and_positive_definite(case: str, name: str) -> None:
    for damping in (0.3, None):
        M = dense(case, name, damping)
        torch.testing.assert_close(M, M.T, rtol=1e-5, atol=1e-6 * float(M.abs().max()))
        assert float(torch.linalg.eigvalsh((M + M.T).double() / 2).min()) > 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", EVERY_LAYER)
def test_microbatches_change_nothing(case: str, name: str) -> None:
    for damping in (0.3, None):
        whole, cut = (applied(case, name, damping, sizes=sizes) for sizes in ((6,), (4, 2)))
        assert_near(cut, whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", EVERY_LAYER)
def test_a_factor_on_the_loss_is_one_on_the_metric(case: str, name: str) -> None:
    M, of_1000 = (applied(case, name, None, sizes=(4, 2), scale=scale) for scale in (1.0, 1000.0))
    assert_near(1000.0 * of_1000, M)


RELU = Case(
    name="relu",
    make=lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
    batch=lambda: (normal(4), classes(2)),
    loss=ce,
)


@pytest.mark.parametrize("name", FOLLOWS_LAYERS)
def test_other_units_of_a_layers_weights_are_other_units_of_the_metric(name: str) -> None:
    model, rescaled = RELU.model(), RELU.model()
    factor = 100.0
    with torch.no_grad():
        rescaled[0].weight.mul_(factor)
        rescaled[0].bias.mul_(factor)
        rescaled[2].weight.div_(factor)
    M = dense(RELU, name, None, model=model)
    after = dense(RELU, name, None, model=rescaled)
    units = [1 / factor, 1 / factor, factor, 1.0]  # theta = units * rescaled theta
    d = torch.cat([torch.full((p.numel(),), u).double() for p, u in zip(model.parameters(), units)])
    # C becomes d C d, and its inverse M becomes M / d / d.
    assert_near(after * d[:, None] * d, M)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_have_no_part_in_it(name: str) -> None:
    model = RELU.model()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    M = dense(RELU, name, None, model=model)
    assert len(M) == 3 + 6
    assert float(torch.linalg.eigvalsh((M + M.T) / 2).min()) > 0.0


@pytest.mark.parametrize("name", NAMES)
def test_unused_parameters_do_not_disturb_it(name: str) -> None:
    model = RELU.model()
    model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    for damping in (None, 0.1, 0.0):
        M = dense(RELU, name, damping, model=model)
        assert M.isfinite().all()
        assert float(torch.linalg.eigvalsh((M + M.T) / 2).min()) > 0.0


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_the_model_as_it_was(name: str) -> None:
    problem = problem_of("batch-norm-train", name)
    problem.loss_and_gradient()
    before = problem.params.read()
    state = torch.get_rng_state()
    problem.preconditioner(0.3)
    assert torch.equal(problem.params.read(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(t.grad is None for t in problem.params.tensors)


class WithAFlatLayer(nn.Module):
    """A layer, and another that the outputs hardly see."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.seen, self.flat = copy.deepcopy(layer), copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.seen(x) + 1e-6 * self.flat(x).tanh()
        return z


def test_a_layer_without_curvature_moves_by_no_more_than_a_multiple_of_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64)

    def moves(most: float) -> Tensor:
        """Of both layers, in units of their size."""
        monkeypatch.setattr(blocks, "MOST_MOVED", most)
        problem, M = built("linear-mse", "kfac", None, model=WithAFlatLayer(layer))
        p = problem.params.pieces(M(problem.gradient).clone())
        sizes = torch.stack([torch.cat([x.flatten() for x in p[k : k + 2]]).norm() for k in (0, 2)])
        return sizes / torch.cat([q.detach().flatten() for q in layer.parameters()]).norm()

    most = blocks.MOST_MOVED
    free, limited = moves(math.inf), moves(most)
    assert free[1] > 1e4
    assert limited[1].item() == pytest.approx(most)
    assert limited[0] == free[0] < 25
