"""Deterministic functions: no data, the parameters are the point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.tasks.task import Batch, Outputs, Task


class _Point(nn.Module):
    """A point whose residuals are the outputs: the Gauss-Newton matrix is that of least squares."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(start)


class _RosenbrockResiduals(_Point):
    def forward(self) -> Tensor:
        x, y = self.point[:-1], self.point[1:]
        return torch.cat((1.0 - x, 10.0 * (y - x**2)))


class Rosenbrock(Task):
    """sum_i (1 - x_i)^2 + 100 (x_{i+1} - x_i^2)^2 [Rosenbrock 1960]; its minimum is 0, at (1, .., 1).

    Args:
        dimension: At least 2; starts at (-1.2, 1, -1.2, 1, ..).
    """

    def __init__(self, dimension: int = 2) -> None:
        if dimension < 2:
            raise TaskError(f"task_args.dimension is {dimension}: it must be at least 2")
        self._dimension = dimension

    def model(self) -> nn.Module:
        start = torch.tensor([-1.2, 1.0]).repeat((self._dimension + 1) // 2)
        return _RosenbrockResiduals(start[: self._dimension])

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return outputs.square().sum()


class _Scaled(_Point):
    root: Tensor

    def __init__(self, start: Tensor, root: Tensor) -> None:
        super().__init__(start)
        self.register_buffer("root", root)

    def forward(self) -> Tensor:
        return self.root * self.point


class Quadratic(Task):
    """sum_i d_i x_i^2 / 2 with d from 1 to `condition`, evenly in logarithm; starts at (1, .., 1).

    Args:
        dimension: Number of parameters.
        condition: Condition number of its matrix.
    """

    def __init__(self, dimension: int = 100, condition: float = 1000.0) -> None:
        if dimension < 1 or condition < 1:
            raise TaskError("task_args: dimension and condition must be at least 1")
        self._dimension, self._condition = dimension, condition

    def model(self) -> nn.Module:
        exponents = torch.linspace(0.0, 1.0, self._dimension)
        return _Scaled(torch.ones(self._dimension), torch.sqrt(self._condition**exponents))

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return 0.5 * outputs.square().sum()
