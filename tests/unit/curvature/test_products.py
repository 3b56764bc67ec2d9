"""Loss, gradient and curvature products of every case against explicit matrices in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dense
import pytest
import torch
from cases import CASES, Case, num_rows, rows
from torch import Tensor, nn

from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import Microbatch, from_closure, from_task
from hfdist.curvature.objective import Problem, Regularisation, Roles
from hfdist.curvature.params import ParameterVector

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
L2 = 0.3


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def problem_of(
    case: Case, model: nn.Module, batches: Sequence[tuple[Any, int]], **settings: Any
) -> Problem:
    """The case's problem on microbatches (batch, seed)."""
    role: list[Microbatch] = [from_task(case.task(), model, b, seed) for b, seed in batches]
    return Problem(
        params=ParameterVector(trainable(model)),
        roles=Roles(gradient=role, curvature=role, loss=role),
        reduction="mean",
        frozen=FixedRandomness(torch.device("cpu"), model),
        **settings,
    )


def microbatches(case: Case, sizes: Sequence[int]) -> list[tuple[Any, int]]:
    batch, low, parts = case.data(), 0, []
    for k, size in enumerate(sizes):
        parts.append((rows(batch, low, low + size), 11 + k))
        low += size
    assert low == num_rows(batch)
    return parts


def close(got: Tensor, expected: Tensor, case: Case) -> None:
    tolerance = 1e-10 if case.double else 1e-5
    torch.testing.assert_close(
        got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max() + 1e-3)
    )


@by_name
@pytest.mark.parametrize("sizes", [(6,), (4, 2)], ids=["whole", "microbatched"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_product_is_that_of_the_explicit_matrix(case: Case, sizes: Any, curvature: Any) -> None:
    if curvature == "hessian" and not case.hessian:
        pytest.skip("torch's second derivatives are wrong")
    model = case.model()
    parts = microbatches(case, sizes)
    functions = [case.function(model, b, seed) for b, seed in parts]
    params = trainable(model)
    problem = problem_of(
        case, model, parts, curvature_opt=curvature, regularisation=Regularisation(weight_decay=L2)
    )
    theta = dense.flat(params, params)

    loss, g = problem.loss_and_gradient()
    assert loss == pytest.approx(
        dense.loss(functions) + 0.5 * L2 * float(theta @ theta), rel=1e-10 if case.double else 1e-6
    )
    close(g, dense.gradient(functions, params) + L2 * theta, case)

    explicit = (dense.ggn if curvature == "ggn" else dense.hessian)(functions, params)
    B = problem.curvature()
    v = torch.randn(len(theta), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = torch.stack([B(v[:, k].clone()).clone() for k in range(3)], 1)
    close(got, explicit @ v + L2 * v, case)
    assert torch.equal(B(v[:, 0].clone()), got[:, 0]), "a product must not change the next one"


def closure(model: nn.Module, x: Tensor, y: Tensor, container: Any) -> Any:
    def forward() -> tuple[Tensor, Any]:
        hidden = torch.tanh(model[0](x))
        z = model[1](hidden)
        return nn.functional.cross_entropy(z, y), container(z, hidden)

    return forward


def closure_product(forward: Any, model: nn.Module) -> Tensor:
    role = [from_closure(forward, 0)]
    problem = Problem(
        params=ParameterVector(trainable(model)),
        roles=Roles(gradient=role, curvature=role, loss=role),
    )
    problem.loss_and_gradient()
    return problem.curvature()(torch.linspace(-1, 1, problem.numel, dtype=torch.float64)).clone()


def two_layers() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)]).double()
    return model, torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))


@pytest.mark.parametrize(
    "container",
    [lambda z, h: (z, h), lambda z, h: {"hidden": h, "logits": z}, lambda z, h: [z, z]],
    ids=["tuple", "dict", "twice"],
)
def test_hidden_states_beside_a_closures_outputs_do_not_count(container: Any) -> None:
    model, x, y = two_layers()
    alone = closure_product(closure(model, x, y, lambda z, _: z), model)
    beside = closure_product(closure(model, x, y, container), model)
    torch.testing.assert_close(beside, alone, rtol=1e-12, atol=1e-14)


def test_a_closure_whose_loss_depends_on_dependent_outputs_is_refused() -> None:
    model, x, y = two_layers()

    def forward() -> tuple[Tensor, Any]:
        hidden = torch.tanh(model[0](x))
        z = model[1](hidden)
        return nn.functional.cross_entropy(z, y) + hidden.pow(4).sum(), (z, hidden)

    with pytest.raises(ValueError, match="depend on each other"):
        closure_product(forward, model)
