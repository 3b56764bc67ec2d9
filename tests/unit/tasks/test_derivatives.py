"""Derivatives carried forward, against torch.func; replayed, and with rows of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.jacobian_rows import RowMethod, UseWatch, jacobian_rows
from hfdist.curvature.linearize import Recorder
from hfdist.errors import TaskError
from hfdist.tasks.derivatives import laplacian, second_derivatives

d = 3


def mlp(activation: Callable[[], nn.Module], outputs: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Linear(d, 5),
        activation(),
        nn.Linear(5, 4, bias=False),
        activation(),
        nn.Linear(4, outputs),
    )


class Written(nn.Module):
    """Sums, products, quotients, slices, Fourier features, a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2 * d, 4), nn.Linear(4, 4)
        self.coefficient = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x: Any) -> Any:
        z = torch.cat([torch.sin(2 * x - self.shift), (x + self.shift).cos()], dim=1)
        h = torch.tanh(self.a(z))
        h = h + self.coefficient * F.silu(self.b(h)) - 1.0
        h = h * h[:, :1] / (2.0 + h.square()) + (1.0 - h) ** 3
        bubble = x[:, 0:1] * (1 - x[:, 0:1]) * torch.exp(-x.pow(2).sum(1, keepdim=True))
        return (h @ torch.ones(4, 2, dtype=h.dtype)) * bubble + 1.0 / (h[:, :2] + 5.0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        f.__name__: lambda f=f: mlp(f)  # type: ignore[misc]
        for f in (
            nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.ELU, nn.Mish, nn.ReLU, nn.Softsign,
        )
    },
    "written": Written,
    "one output": lambda: mlp(nn.Tanh, 1),
}  # fmt: skip


def points(n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, d, generator=generator, dtype=torch.float64)


def truth(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def u(p: Tensor) -> Tensor:
        result: Tensor = model(p.unsqueeze(0))[0]
        return result

    H = vmap(hessian(u))(x)  # [n, m, d, d]
    return model(x), vmap(jacrev(u))(x).transpose(1, 2), H.diagonal(dim1=2, dim2=3).transpose(1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_against_torch_func(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), points()
    u, du, ddu = truth(model, x)
    own = second_derivatives(model, x)
    for got, expected in zip(own, (u, du, ddu)):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    for coordinates in (None, [1, 2], [0]):
        got = laplacian(model, x, coordinates)
        expected = ddu[:, coordinates or range(d)].sum(1)
        for a, b in zip(got, (u, du, expected)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class Count(TorchDispatchMode):
    """Numbers that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


@pytest.mark.parametrize("name", MODELS)
def test_without_the_gradient_the_last_layers_do_not_carry_it(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), points()
    numbers, found = [], []
    for gradient in (True, False):
        with Count() as count:
            found.append(laplacian(model, x, gradient=gradient))
        numbers.append(count.numbers)
    assert torch.equal(found[1][0], found[0][0])
    assert torch.equal(found[1][2], found[0][2])
    assert found[1][1].shape == (len(x), 0, found[0][0].shape[1])
    # Of layers and activations at the end; a product needs the derivatives of its factors at once.
    assert numbers[1] < numbers[0] or name == "written"


@pytest.mark.parametrize("name", ["Tanh", "GELU", "written"])
def test_they_are_replayed_and_have_rows(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), points()
    tensors = list(model.parameters())
    recorder = Recorder(tensors)
    with recorder:
        z = laplacian(model, x)[2]
    v = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in tensors]
    (Jv,) = recorder.program([z])(v)
    watch, method = UseWatch(tensors, len(x)), RowMethod()
    with watch:
        z = laplacian(model, x)[2]
    J = jacobian_rows(z, watch.finish(), tensors, method)
    assert method.per_example, method.reason
    assert Jv is not None
    torch.testing.assert_close(J @ torch.cat([t.reshape(-1) for t in v]), Jv.reshape(-1))
    assert ProductEngine().reported == "linearize"


def test_a_function_without_a_rule_is_named() -> None:
    with pytest.raises(TaskError, match="no rule for softmax: write the model"):
        laplacian(lambda x: torch.softmax(x, 1), points())


def test_points_are_a_matrix() -> None:
    with pytest.raises(TaskError, match=r"points have shape \[6\]"):
        laplacian(nn.Linear(1, 1), points()[:, 0])


def test_a_model_of_nothing() -> None:
    with pytest.raises(TaskError, match="does not depend on its input"):
        laplacian(lambda x: torch.ones(6, 1), points())
