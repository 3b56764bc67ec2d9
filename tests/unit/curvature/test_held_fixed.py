"""What a program holds fixed on purpose is no lost gradient for the checks of a first solve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_parts
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.errors import TaskError


class Tied(nn.Module):
    """Uses its padding row, which has a gradient by the decoder alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=0)
        nn.init.normal_(self.embedding.weight)
        self.hidden = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.embedding(ids))) @ self.embedding.weight.T


class StopGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(h) * h.detach().exp()


class Cube(torch.autograd.Function):
    """Autograd cannot see through its backward pass, and holds nothing fixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.power(x.detach().numpy(), 3))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())


class Opaque(StopGradient):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(Cube.apply(self.first(x)))


def problem_of(model: nn.Module, x: Tensor, curvature: Any = "ggn") -> Problem:
    y = torch.arange(len(x)) % 3
    role = [from_parts(lambda: model(x), lambda z: (F.cross_entropy(z, y), 1.0), seed=0)]
    return Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        frozen=FixedRandomness(torch.device("cpu"), model),
        curvature_opt=curvature,
    )


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def rows() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_padding_of_a_tied_embedding(curvature: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = made(Tied), torch.tensor([0, 1, 2, 0, 3, 4])
    _, g = problem_of(model, ids, curvature).loss_and_gradient()
    expected = torch.autograd.grad(
        F.cross_entropy(model(ids), torch.arange(6) % 3), list(model.parameters())
    )
    torch.testing.assert_close(g, torch.cat([t.reshape(-1) for t in expected]))
    assert not caplog.records


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_what_is_detached_is_told_once(curvature: Any, caplog: pytest.LogCaptureFixture) -> None:
    problem = problem_of(made(StopGradient), rows(), curvature)
    for _ in range(2):
        problem.loss_and_gradient()
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "the loss depends on parameters through what the program detaches"
    ]


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_what_autograd_cannot_see_is_still_refused(curvature: Any) -> None:
    with pytest.raises(TaskError, match=r"off a difference of (outputs|gradients)"):
        problem_of(made(Opaque), rows(), curvature).loss_and_gradient()
