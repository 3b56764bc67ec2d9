"""What a program holds fixed on purpose: padding raises no alarm, what is detached is named."""

from __future__ import annotations

from typing import Any

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


def problem_of(kind: type[nn.Module], x: Tensor, curvature: Any) -> tuple[nn.Module, Problem]:
    torch.manual_seed(0)
    model, y = kind().double(), torch.arange(len(x)) % 3
    role = [from_parts(lambda: model(x), lambda z: (F.cross_entropy(z, y), 1.0), seed=0)]
    problem = Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        frozen=FixedRandomness(torch.device("cpu"), model),
        curvature_opt=curvature,
    )
    return model, problem


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_padding_of_a_tied_embedding(curvature: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.tensor([0, 1, 2, 0, 3, 4])
    model, problem = problem_of(Tied, ids, curvature)
    _, g = problem.loss_and_gradient()
    loss = F.cross_entropy(model(ids), torch.arange(6) % 3)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(g, torch.cat([t.reshape(-1) for t in expected]))
    assert not caplog.records


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_what_is_detached_is_named(curvature: Any) -> None:
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, problem = problem_of(StopGradient, x, curvature)
    with pytest.raises(TaskError, match="where what the program detaches is held fixed"):
        problem.loss_and_gradient()
