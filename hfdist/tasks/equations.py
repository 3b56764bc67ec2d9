"""Differential equations with known solutions, as least squares on points: physics-informed networks.

Set-ups of Poisson and heat equations are those of Dangel, Mueller & Zeinhofer 2024 (arXiv:2405.15603); of
convection and reaction those of Krishnapriyan et al. 2021 (arXiv:2109.01050); of Burgers' equation that of
Raissi, Perdikaris & Karniadakis 2019.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor, nn

from hfdist.errors import TaskError
from hfdist.tasks.derivatives import laplacian
from hfdist.tasks.residuals import ResidualTask, Term

pi = math.pi


class Equation(ResidualTask):
    """An equation for u: [0, 1]^d or another box -> R, and a network of tanh units for it.

    Args:
        widths: Of the hidden layers.
        interior, conditions: Numbers of points inside, and of all boundary and initial conditions together.
        every_step: Draw the points anew in every step.
        seed: Of the evaluation points.
        evaluation: Their number.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64,),
        interior: int = 900,
        conditions: int = 120,
        every_step: bool = False,
        evaluation: int = 9_000,
        seed: int = 99,
    ) -> None:
        widths = [widths] if isinstance(widths, int) else list(widths)
        if not widths or min(widths) < 1:
            raise TaskError(
                f"task_args.widths is {widths}: give at least one width, each at least 1"
            )
        for name, number in (
            ("interior", interior),
            ("conditions", conditions),
            ("evaluation", evaluation),
        ):
            if number < 4:
                raise TaskError(f"task_args.{name} is {number}: it must be at least 4")
        self._widths, self._interior, self._conditions = widths, interior, conditions
        self._every_step, self._evaluation, self._seed = every_step, evaluation, seed

    @property
    @abc.abstractmethod
    def box(self) -> Sequence[tuple[float, float]]:
        """Range of every coordinate."""

    @abc.abstractmethod
    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Of the equation, at points inside."""

    def model(self) -> nn.Module:
        widths = [len(self.box), *self._widths]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def uniform(self, n: int, generator: Generator) -> Tensor:
        """Points [n, d] in the box."""
        low, high = torch.tensor(self.box, dtype=torch.float64).T
        x = torch.rand(n, len(self.box), generator=generator, dtype=torch.float64)
        return low + (high - low) * x

    def at(self, n: int, generator: Generator, coordinate: int, value: float) -> Tensor:
        """Points [n, d] of the box with one coordinate fixed."""
        x = self.uniform(n, generator)
        x[:, coordinate] = value
        return x

    def evaluation_points(self) -> Tensor:
        return self.uniform(self._evaluation, Generator().manual_seed(self._seed))

    def terms(self) -> list[Term]:
        return [
            Term(
                name="interior",
                points=lambda generator: self.uniform(self._interior, generator),
                residuals=self.residual,
                every_step=self._every_step,
            ),
            *self.condition_terms(),
        ]

    @abc.abstractmethod
    def condition_terms(self) -> list[Term]:
        """Boundary and initial conditions."""


class Poisson(Equation):
    """-Laplacian u = f on the unit cube, u given on its boundary.

    The solution is prod_k sin(pi x_k) (`solution: sines`) or sum_k cos(pi x_k) (`cosines`).

    Args:
        dimension: Of the cube.
        solution: sines or cosines.
        **points: See `Equation`.
    """

    def __init__(self, dimension: int = 2, solution: str = "sines", **points: int) -> None:
        super().__init__(**points)  # type: ignore[arg-type]
        if dimension < 1:
            raise TaskError(f"task_args.dimension is {dimension}: it must be at least 1")
        if solution not in ("sines", "cosines"):
            raise TaskError(f"task_args.solution is {solution!r}: it must be sines or cosines")
        self._dimension, self._solution = dimension, solution

    @property
    def box(self) -> Sequence[tuple[float, float]]:
        return [(0.0, 1.0)] * self._dimension

    def solution(self, points: Tensor) -> Tensor:
        if self._solution == "sines":
            return torch.sin(pi * points).prod(1)
        return torch.cos(pi * points).sum(1)

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        factor = self._dimension if self._solution == "sines" else 1  # -Laplacian u = factor pi^2 u
        return laplacian(model, x, gradient=False)[2][:, 0] + factor * pi**2 * self.solution(x)

    def condition_terms(self) -> list[Term]:
        return [
            Term(
                name="boundary",
                points=self.boundary,
                residuals=lambda model, x: model(x)[:, 0] - self.solution(x),
                every_step=self._every_step,
            )
        ]

    def boundary(self, generator: Generator) -> Tensor:
        """Points on the cube's faces."""
        n, d = self._conditions, self._dimension
        x = self.uniform(n, generator)
        face = torch.randint(d, (n,), generator=generator)
        x[torch.arange(n), face] = torch.randint(2, (n,), generator=generator).double()
        return x


class Evolution(Equation):
    """An equation in t (the first coordinate) and x, with an initial and a boundary condition, a half of the
    conditions' points and weight each."""

    def condition_terms(self) -> list[Term]:
        n = self._conditions // 2
        return [
            Term(
                name="initial",
                points=lambda generator: self.at(n, generator, 0, 0.0),
                residuals=lambda model, x: model(x)[:, 0] - self.given(x),
                weight=0.5,
                every_step=self._every_step,
            ),
            Term(
                name="boundary",
                points=lambda generator: self.ends(self._conditions - n, generator),
                residuals=self.boundary_residual,
                weight=0.5,
                every_step=self._every_step,
            ),
        ]

    def ends(self, n: int, generator: Generator) -> Tensor:
        """Points on both ends of the interval in x."""
        low, high = self.box[1]
        x = self.uniform(n, generator)
        side = torch.randint(2, (n,), generator=generator).double()
        x[:, 1] = low + (high - low) * side
        return x

    def boundary_residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """u as it is given there."""
        return model(x)[:, 0] - self.given(x)

    def given(self, points: Tensor) -> Tensor:
        """u at the start and on the boundary [n]."""
        return self.solution(points)


class Heat(Evolution):
    """u_t = kappa u_xx on [0, 1]^2, u = 0 at x = 0 and 1, u(0, x) = sin(pi x).

    Args:
        kappa: Conductivity.
        **points: See `Equation`.
    """

    def __init__(self, kappa: float = 0.25, **points: int) -> None:
        super().__init__(**points)  # type: ignore[arg-type]
        if not kappa > 0:
            raise TaskError(f"task_args.kappa is {kappa}: it must be above 0")
        self._kappa = kappa

    box = ((0.0, 1.0), (0.0, 1.0))

    def solution(self, points: Tensor) -> Tensor:
        t, x = points.T
        return torch.exp(-self._kappa * pi**2 * t) * torch.sin(pi * x)

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        _, du, u_xx = laplacian(model, x, coordinates=[1])
        return du[:, 0, 0] - self._kappa * u_xx[:, 0]


class Periodic(Evolution):
    """Equal values at both ends of the interval in x."""

    box = ((0.0, 1.0), (0.0, 2.0 * pi))

    def ends(self, n: int, generator: Generator) -> Tensor:
        return self.at(n, generator, 1, 0.0)

    def boundary_residual(self, model: nn.Module, x: Tensor) -> Tensor:
        other = torch.stack((x[:, 0], torch.full_like(x[:, 1], 2.0 * pi)), 1)
        return model(x)[:, 0] - model(other)[:, 0]


class Convection(Periodic):
    """u_t + beta u_x = 0 on [0, 1] x [0, 2 pi], periodic, u(0, x) = sin(x).

    Args:
        beta: Speed.
        **points: See `Equation`.
    """

    def __init__(self, beta: float = 40.0, **points: int) -> None:
        super().__init__(**points)  # type: ignore[arg-type]
        self._beta = beta

    def solution(self, points: Tensor) -> Tensor:
        return torch.sin(points[:, 1] - self._beta * points[:, 0])

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        du = laplacian(model, x, coordinates=[])[1]
        return du[:, 0, 0] + self._beta * du[:, 1, 0]


class Reaction(Periodic):
    """u_t = rho u (1 - u) on [0, 1] x [0, 2 pi], u(0, x) a Gaussian around pi.

    Args:
        rho: Rate.
        **points: See `Equation`.
    """

    def __init__(self, rho: float = 5.0, **points: int) -> None:
        super().__init__(**points)  # type: ignore[arg-type]
        self._rho = rho

    def solution(self, points: Tensor) -> Tensor:
        t, x = points.T
        start = torch.exp(-((x - pi) ** 2) / (2.0 * (pi / 4.0) ** 2))
        growth = start * torch.exp(self._rho * t)
        return growth / (growth + 1.0 - start)

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        u, du, _ = laplacian(model, x, coordinates=[])
        return du[:, 0, 0] - self._rho * u[:, 0] * (1.0 - u[:, 0])


class Burgers(Evolution):
    """u_t + u u_x = nu u_xx on [0, 1] x [-1, 1], u = 0 at x = -1 and 1, u(0, x) = -sin(pi x).

    The solution is the Cole-Hopf integral, by Gauss-Hermite quadrature [Basdevant et al. 1986].

    Args:
        nu: Viscosity.
        **points: See `Equation`.
    """

    box = ((0.0, 1.0), (-1.0, 1.0))

    def __init__(self, nu: float = 0.01 / pi, **points: int) -> None:
        super().__init__(**points)  # type: ignore[arg-type]
        if not nu > 0:
            raise TaskError(f"task_args.nu is {nu}: it must be above 0")
        self._nu = nu

    def solution(self, points: Tensor) -> Tensor:
        t, x = points.detach().cpu().double().T.unsqueeze(-1)
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(150))
        y = x - torch.sqrt(4.0 * self._nu * t) * nodes  # [n, nodes]
        exponent = -torch.cos(pi * y) / (2.0 * pi * self._nu)
        f = weights * torch.exp(exponent - exponent.amax(1, keepdim=True))
        u = -(f * torch.sin(pi * y)).sum(1) / f.sum(1)
        return u.to(points)

    def given(self, points: Tensor) -> Tensor:
        return -torch.sin(pi * points[:, 1])  # without the integral

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        u, du, u_xx = laplacian(model, x, coordinates=[1])
        return du[:, 0, 0] + u[:, 0] * du[:, 1, 0] - self._nu * u_xx[:, 0]
