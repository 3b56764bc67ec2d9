"""A residual by nested torch.autograd.grad takes the steps of its `laplacian` form; what it costs more is
counted, not timed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.optim.options import HFOptions
from hfdist.optim.step import HFState, hf_step
from hfdist.tasks.equations import Poisson


class Nested(Poisson):
    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        lap = torch.zeros_like(x[:, 0])
        for k in range(x.shape[1]):
            lap = lap + torch.autograd.grad(du[:, k].sum(), x, create_graph=True)[0][:, k]
        return lap + x.shape[1] * math.pi**2 * self.solution(x)


class Count(TorchDispatchMode):
    """Operations that are no views, and the numbers that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = [r.alias_info for r in func._schema.returns]
        if all(alias is None or alias.is_write for alias in returns):
            self.calls += 1
            self.numbers += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def counted(kind: type[Poisson], solver: str) -> tuple[Tensor, int, int]:
    """Parameters after a step [P]; operations and numbers of the next one, which knows the passes' layout."""
    torch.manual_seed(0)
    task = kind(interior=200, conditions=40)
    model, data = task.model().double(), task.train_data()
    role = [
        from_task(task, model, data.points(k, 0, torch.arange(n)), k)
        for k, n in enumerate(data.sizes)
    ]
    params, engine = ParameterVector(model.parameters()), ProductEngine()

    def step() -> Tensor:
        problem = Problem(
            params=params,
            roles=Roles(gradient=role, curvature=role, loss=role),
            residuals=True,
            row_solver=solver == "dense",
            engine=engine,
            frozen=FixedRandomness(torch.device("cpu"), model),
        )
        hf_step(problem, HFState(damping=10.0), HFOptions(solver=solver))  # type: ignore[arg-type]
        return params.read().clone()

    start = params.read().clone()
    for _ in range(4):  # the first ones check rows and products
        params.write(start)
        theta = step()
    params.write(start)
    with Count() as count:
        step()
    return theta, count.calls, count.numbers


@pytest.mark.parametrize(
    ("solver", "operations", "numbers"), [("dense", 1.4, 1.8), ("krylov", 1.5, 2.4)]
)
def test_the_nested_form_takes_the_same_step(
    solver: str, operations: float, numbers: float
) -> None:
    """Bounds are 1.2 times what was found."""
    expected, *forward = counted(Poisson, solver)
    theta, *nested = counted(Nested, solver)
    torch.testing.assert_close(theta, expected, rtol=1e-6, atol=1e-8)
    assert nested[0] <= operations * forward[0]
    assert nested[1] <= numbers * forward[1]
