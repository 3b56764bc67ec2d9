"""Built-in equations: their solutions solve them, their residuals are those of the equation, and they
train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfdist.api import train
from hfdist.config.job import from_dict
from hfdist.errors import TaskError
from hfdist.tasks.equations import Burgers, Convection, Equation, Heat, Poisson, Reaction
from hfdist.tasks.tabular import Tabular

Left = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(points, u, du/dx [n, d], d2u/dx_k^2 [n, d]) -> what must vanish."""
EQUATIONS: dict[str, tuple[Callable[[], Equation], Left]] = {
    "poisson": (
        Poisson,
        lambda x, u, du, ddu: ddu.sum(1) + 2 * math.pi**2 * torch.sin(math.pi * x).prod(1),
    ),
    "poisson5d": (
        lambda: Poisson(dimension=5, solution="cosines"),
        lambda x, u, du, ddu: ddu.sum(1) + math.pi**2 * torch.cos(math.pi * x).sum(1),
    ),
    "heat": (Heat, lambda x, u, du, ddu: du[:, 0] - 0.25 * ddu[:, 1]),
    "convection": (Convection, lambda x, u, du, ddu: du[:, 0] + 40 * du[:, 1]),
    "reaction": (Reaction, lambda x, u, du, ddu: du[:, 0] - 5 * u * (1 - u)),
    "burgers": (
        lambda: Burgers(nu=0.1),
        lambda x, u, du, ddu: du[:, 0] + u * du[:, 1] - 0.1 * ddu[:, 1],
    ),
}
by_name = pytest.mark.parametrize("name", EQUATIONS)


def inside(task: Equation, n: int) -> Tensor:
    """Points away from the box's faces, where differences of the solution can be taken."""
    x = task.uniform(n, torch.Generator().manual_seed(0))
    low, high = torch.tensor(task.box, dtype=torch.float64).T
    return 0.5 * (low + high) + 0.9 * (x - 0.5 * (low + high))


@by_name
def test_the_solution_solves_the_equation(name: str) -> None:
    make, left = EQUATIONS[name]
    task, h = make(), 1e-4
    x = inside(task, 50)
    u, first, second = task.solution(x), [], []
    for k in range(x.shape[1]):
        e = torch.zeros_like(x)
        e[:, k] = h
        plus, minus = task.solution(x + e), task.solution(x - e)
        first.append((plus - minus) / (2 * h))
        second.append((plus - 2 * u + minus) / h**2)
    du, ddu = torch.stack(first, 1), torch.stack(second, 1)
    allowed = 1e-4 * float(1 + du.abs().max() + ddu.abs().max())
    assert float(left(x, u, du, ddu).abs().max()) < allowed


@by_name
def test_the_residual_is_that_of_the_equation(name: str) -> None:
    """Of a network, whose derivatives autograd takes."""
    make, left = EQUATIONS[name]
    task = make()
    torch.manual_seed(0)
    model = task.model().double()
    x = task.uniform(20, torch.Generator().manual_seed(0)).requires_grad_()
    u = model(x)[:, 0]
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    ddu = torch.stack(
        [
            torch.autograd.grad(du[:, k].sum(), x, retain_graph=True)[0][:, k]
            for k in range(x.shape[1])
        ],
        1,
    )
    torch.testing.assert_close(task.residual(model, x.detach()), left(x, u, du, ddu))


@by_name
def test_conditions_hold_for_the_solution(name: str) -> None:
    task = EQUATIONS[name][0]()

    class Exact(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return task.solution(x).unsqueeze(1)

    for term in task.condition_terms():
        assert callable(term.points)
        x = term.points(torch.Generator().manual_seed(1))
        assert float(term.residuals(Exact(), x).abs().max()) < 1e-9


def test_numbers_of_parameters() -> None:
    sizes = {
        257: Poisson(),
        9_873: Poisson(widths=[64, 64, 48, 48]),  # type: ignore[arg-type]
        449: Poisson(dimension=5),
        10_065: Poisson(dimension=5, widths=[64, 64, 48, 48]),  # type: ignore[arg-type]
    }
    for size, task in sizes.items():
        assert sum(p.numel() for p in task.model().parameters()) == size


def job(task: str, output: Path, steps: int, **changes: Any) -> Any:
    return from_dict(
        {
            "task": task,
            "steps": steps,
            "dtype": "float64",
            "output": str(output),
            "tracking": {"enabled": False},
            "checkpoint": {"every": 1000},
            **changes,
        }
    )


def test_poisson_trains_and_is_drawn(tmp_path: Path) -> None:
    config = job(
        "hfdist.tasks.equations:Poisson",
        tmp_path,
        60,
        task_args={"widths": [12], "interior": 100, "conditions": 40, "evaluation": 400},
    )
    result = train(config)
    assert result["status"] == "FINISHED"
    assert result["eval_relative_error"] < 1e-2
    assert result["eval_l2_error"] == pytest.approx(math.sqrt(2 * result["eval_loss"]), rel=1e-9)
    assert (Path(result["run_dir"]) / "plots" / "solution.png").stat().st_size > 10_000


@pytest.mark.parametrize("width", [8, 40], ids=["dense", "sample_space"])
def test_points_anew_every_step_resume_exactly(tmp_path: Path, width: int) -> None:
    """To the bit, with either matrix."""
    from hfdist.api import resume

    args = {
        "dimension": 2,
        "widths": [width],
        "interior": 40,
        "conditions": 20,
        "every_step": True,
        "evaluation": 50,
    }
    task = "hfdist.tasks.equations:Poisson"
    whole = train(job(task, tmp_path / "whole", 8, task_args=args))
    part = train(job(task, tmp_path / "part", 5, task_args=args))
    again = resume(part["run_dir"], ["steps=8"])
    assert again["final_loss"] == whole["final_loss"]


@pytest.mark.parametrize(
    ("table", "loss", "error"), [("diabetes", "squares", 0.9), ("diabetes", "soft_l1", 0.9)]
)
def test_tables(tmp_path: Path, table: str, loss: str, error: float) -> None:
    args = {"table": table, "loss": loss, "hidden": 4, "ridge": 0.1}
    result = train(job("hfdist.tasks.tabular:Tabular", tmp_path, 15, task_args=args))
    assert result["status"] == "FINISHED"
    assert result["eval_relative_error"] < error


def test_several_targets() -> None:
    assert Tabular(table="linnerud").model()(torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Poisson(dimension=0), "dimension is 0"),
        (lambda: Poisson(solution="x"), "solution is 'x'"),
        (lambda: Poisson(interior=1), "interior is 1"),
        (lambda: Poisson(widths=[]), r"widths is \[\]"),
        (lambda: Heat(kappa=-1.0), "kappa is -1.0"),
        (lambda: Burgers(nu=0.0), "nu is 0.0"),
        (lambda: Tabular(table="iris"), "table is 'iris'"),
        (lambda: Tabular(held_out=1.0), "held_out 1.0"),
    ],
)
def test_arguments_out_of_range(make: Any, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        make()
