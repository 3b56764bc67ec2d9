"""Rows of Jacobians from one backward pass, against rows one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dense
import pytest
import torch
from test_input_derivatives import FORMS, network, points, residual
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from hfdist.curvature.jacobian_rows import RowMethod, UseWatch, jacobian_rows
from hfdist.curvature.kronecker.recurrent import StepByStep


def rows(
    model: nn.Module, f: Callable[[], Tensor], n: int, truth: bool = True
) -> tuple[Tensor, Tensor, RowMethod]:
    """What is computed, the truth (nothing, where it takes too long), and how."""
    tensors, method = list(model.parameters()), RowMethod()
    watch = UseWatch(tensors, n)
    with watch:
        z = f()
    J = jacobian_rows(z, watch.finish(), tensors, method)
    return J, dense.jacobian(z, tensors) if truth else torch.empty(0), method


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_differential_equation(form: str) -> None:
    model, x = network(), points()
    J, truth, method = rows(model, lambda: residual(form, model, x), len(x))
    assert method.per_example
    torch.testing.assert_close(J, truth, rtol=1e-12, atol=1e-14)


class Scales(nn.Module):
    """Parameters that are no matrices: a coefficient, one a feature, one that is expanded; a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.coefficient = nn.Parameter(torch.tensor(0.7))
        self.features = nn.Parameter(torch.linspace(0.5, 1.5, 3))
        self.offset = nn.Parameter(torch.tensor([0.1]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.coefficient * self.layer(x)) * self.features - self.offset
        return self.layer(h / (1.0 + self.features.square())) + self.offset.expand(len(x), 3)


class Parts(nn.Module):
    """A weight that is used in parts, whole from both sides, and beside a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.square = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(nn.functional.linear(x, self.weight))
        top = nn.functional.linear(x, self.weight[:2])
        bottom = torch.addmm(h[:, :1], h, self.weight, alpha=0.5)
        return torch.cat((self.square(self.square(h)), top, bottom), 1)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 2, 2), nn.LayerNorm(2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x.unsqueeze(1)))
        return self.head(self.norm(h.transpose(1, 2)).flatten(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "scales": Scales,
    "parts": Parts,
    "deep": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2)
    ),
    "batches of matrices": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten()
    ),
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)),
    "convolution": Convolution,
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
}
INTERACT = {"batch norm"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "n", [1, 3, 5, 8, 64]
)  # from four a number of a weight on: by its Jacobian
def test_models(name: str, n: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x = torch.randn(max(n, 2) if name in INTERACT else n, 3, dtype=torch.float64)
    J, truth, method = rows(model, lambda: model(x), len(x))
    torch.testing.assert_close(J, truth, rtol=1e-10, atol=1e-12)
    if n >= 5:
        assert method.per_example == (name not in INTERACT)
        assert (method.reason is None) == method.per_example


class Cube(torch.autograd.Function):
    """Invisible below autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_custom_functions_of_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    J, truth, method = rows(model, lambda: model[1](Cube.apply(model[0](x))), 6)
    assert method.per_example
    torch.testing.assert_close(J, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("apart", [1, 16, 32, 48])
def test_examples_that_depend_on_one_far_away(apart: int) -> None:
    torch.manual_seed(0)
    model, x = network(), torch.randn(64, 2, dtype=torch.float64)

    def outputs() -> Tensor:
        z: Tensor = model[:-1](x)
        return model[-1](z + torch.tanh(z.roll(apart, 0)))  # type: ignore[no-any-return]

    J, truth, method = rows(model, outputs, len(x))
    torch.testing.assert_close(J, truth, rtol=1e-10, atol=1e-12)
    assert not method.per_example


def test_the_layouts_are_found_once() -> None:
    model, x = network(), points()
    method = RowMethod()
    tensors = list(model.parameters())
    for _ in range(2):
        watch = UseWatch(tensors, len(x))
        with watch:
            z = residual("func_jacrev", model, x)
        jacobian_rows(z, watch.finish(), tensors, method)
    assert len(method.layouts) == 1


class Recurrent(nn.Module):
    """A number from the last state of every sequence."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        width = layer.proj_size or layer.hidden_size
        self.head = nn.Linear(width * (2 if layer.bidirectional else 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.layer(x)
        return self.head(states[:, -1])


LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "tanh": lambda: nn.RNN(2, 3, batch_first=True),
    "gru": lambda: nn.GRU(2, 3, batch_first=True),
    "lstm": lambda: nn.LSTM(2, 3, batch_first=True),
    "projected": lambda: nn.LSTM(2, 4, batch_first=True, proj_size=3),
    "without biases": lambda: nn.LSTM(2, 3, batch_first=True, bias=False),
    "two layers, both ways": lambda: nn.LSTM(2, 2, 2, batch_first=True, bidirectional=True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [3, 12])  # a few steps, and so many that they are taken at once
def test_recurrent_layers(name: str, length: int) -> None:
    torch.manual_seed(0)
    model = Recurrent(LAYERS[name]()).double()
    x = torch.randn(6, length, 2, dtype=torch.float64)

    def stepwise() -> Tensor:
        with StepByStep():
            return model(x)

    torch.testing.assert_close(stepwise(), model(x))
    J, truth, method = rows(model, stepwise, 6)
    assert method.per_example, method.reason
    torch.testing.assert_close(J, truth, rtol=1e-10, atol=1e-12)


def test_rounding_after_many_steps_hides_no_example() -> None:
    """In float32, what is left of gradients after a hundred steps is mostly sums that cancel."""
    torch.manual_seed(0)
    model = Recurrent(nn.RNN(2, 16, batch_first=True))
    nn.init.orthogonal_(model.layer.weight_hh_l0)
    x = torch.rand(200, 80, 2)

    def stepwise() -> Tensor:
        with StepByStep():
            return model(x)

    J, _, method = rows(model, stepwise, 200, truth=False)
    assert method.per_example, method.reason
    model.double()
    x = x.double()
    exact, _, _ = rows(model, stepwise, 200, truth=False)
    assert float((J - exact).norm() / exact.norm()) < 1e-4
