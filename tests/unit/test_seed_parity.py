"""preset="seed" follows PyTorchHessianFree's own trajectories, and its calls are accepted as they are.

tests/data/seed_reference.json holds what PyTorchHessianFree (its newest public version, on BackPACK's
products) computed on the problems below: weights and data are formulas, so no random number generator
stands between the two. The numbers have 17 significant digits.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfdist.hessian_free import HessianFree

REFERENCE = Path(__file__).parents[1] / "data" / "seed_reference.json"
STEPS = 10
MINIBATCHES = (5, 4, 3)  # uneven, so that a mean of means would differ from the mean


@dataclass(frozen=True)
class Case:
    """One trajectory: a problem, the options given to the constructor, and the way a step is called."""

    name: str
    activation: type[nn.Module] | None = nn.Tanh  # None: Rosenbrock's function, without a model
    loss: type[nn.Module] = nn.MSELoss
    options: dict[str, Any] = field(default_factory=dict)
    call: str = (
        "step"  # "step", "acc_step", or "acc_step_roles": other data for gradient and product
    )
    preconditioned: bool = False
    is_sensitive: bool = False
    """Long solves amplify rounding: the trajectory is followed as far as changes of the parameters in
    the last bits leave it the same."""


CASES = [
    Case("ggn_mse", options={"curvature_opt": "ggn"}),
    Case("ggn_cross_entropy", nn.Sigmoid, nn.CrossEntropyLoss),
    Case("hessian_mse", options={"curvature_opt": "hessian"}, is_sensitive=True),
    Case("hessian_cross_entropy", nn.Sigmoid, nn.CrossEntropyLoss, {"curvature_opt": "hessian"}),
    Case("acc_step_ggn_mse", call="acc_step"),
    Case("acc_step_ggn_cross_entropy", nn.Sigmoid, nn.CrossEntropyLoss, call="acc_step"),
    Case(
        "acc_step_hessian_mse",
        options={"curvature_opt": "hessian"},
        call="acc_step",
        is_sensitive=True,
    ),
    Case("acc_step_roles", nn.Sigmoid, nn.CrossEntropyLoss, call="acc_step_roles"),
    Case("preconditioned_mse", preconditioned=True),
    Case(
        "preconditioned_cross_entropy",
        nn.Sigmoid,
        nn.CrossEntropyLoss,
        preconditioned=True,
        is_sensitive=True,
    ),
    Case("no_backtracking", options={"use_cg_backtracking": False}),
    Case(
        "no_backtracking_constant_lr",
        options={"use_cg_backtracking": False, "use_linesearch": False, "lr": 0.5},
    ),
    Case("backtracking_constant_lr", options={"use_linesearch": False, "lr": 0.5}),
    Case("line_search_from_2", options={"lr": 2.0}, is_sensitive=True),
    Case("fixed_damping_cold_start", options={"adapt_damping": False, "cg_decay_x0": 0.0}),
    Case("few_iterations", options={"cg_max_iter": 3}),
    Case(
        "iterations_up_to_dimension",
        options={"cg_max_iter": None, "damping": 0.1},
        is_sensitive=True,
    ),
    Case("rosenbrock", None, options={"curvature_opt": "hessian"}),
    Case("rosenbrock_undamped_search", None, options={"curvature_opt": "hessian", "damping": 0.01}),
]


def formula(*shape: int, frequency: float, phase: float) -> Tensor:
    """Values in [-1, 1] that look unrelated: sin(frequency (i + 1)^1.5 + phase), float64."""
    numel = int(torch.tensor(shape).prod())
    i = torch.arange(1, numel + 1, dtype=torch.float64)
    return torch.sin(frequency * i**1.5 + phase).reshape(shape)


def network(activation: type[nn.Module]) -> nn.Sequential:
    """4 - 8 - 3 units in float64."""
    model = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for place, p in enumerate(model.parameters()):
            p.copy_(0.7 * formula(*p.shape, frequency=0.9 + 0.1 * place, phase=1.3 * place))
    return model


def examples(loss: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """12 examples: inputs [12, 4], and targets [12, 3] or classes [12]."""
    inputs = formula(sum(MINIBATCHES), 4, frequency=0.37, phase=0.2)
    if loss is nn.CrossEntropyLoss:
        return inputs, torch.arange(sum(MINIBATCHES)) * 5 % 7 % 3
    return inputs, formula(sum(MINIBATCHES), 3, frequency=0.53, phase=0.9)


def rosenbrock(xy: Tensor) -> Tensor:
    """(1 - x)^2 + 100 (y - x^2)^2."""
    x, y = xy
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@dataclass(frozen=True)
class Run:
    """What a trajectory is computed with: `step()` takes one step, `loss()` evaluates the objective."""

    optimizer: Any
    step: Callable[[], Any]
    loss: Callable[[], float]


def start(
    case: Case,
    optimizer_class: Callable[..., Any],
    preconditioner: Callable[..., Any],
) -> Run:
    """Build the problem of `case`.

    Args:
        optimizer_class: HessianFree, or what stands for it.
        preconditioner: Maps (optimizer, model, loss function, inputs, targets) to M_func.
    """
    if case.activation is None:
        xy = torch.tensor([-1.5, 1.0], dtype=torch.float64, requires_grad=True)
        opt = optimizer_class([xy], **case.options)
        return Run(
            opt,
            lambda: opt.step(forward=lambda: (rosenbrock(xy), None)),
            lambda: float(rosenbrock(xy)),
        )
    model, loss_func = network(case.activation), case.loss()
    inputs, targets = examples(case.loss)
    opt = optimizer_class(model.parameters(), **case.options)

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model(inputs)
        return loss_func(outputs, targets), outputs

    def step() -> Any:
        M_func = None
        if case.preconditioned:
            M_func = preconditioner(opt, model, loss_func, inputs, targets)
        if case.call == "step":
            return opt.step(forward=forward, M_func=M_func)
        minibatches = list(zip(inputs.split(MINIBATCHES), targets.split(MINIBATCHES)))
        roles = {}
        if case.call == "acc_step_roles":
            roles = {"grad_datalist": minibatches[1:], "mvp_datalist": minibatches[::2]}
        return opt.acc_step(model, loss_func, minibatches, M_func=M_func, reduction="mean", **roles)

    return Run(opt, step, lambda: float(forward()[0]))


def hfdist_preconditioner(opt: HessianFree, model: nn.Module, *data: Any) -> Any:
    return opt.get_preconditioner(model, *data, "mean")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_follows_the_seeds_trajectory(case: Case) -> None:
    reference = json.loads(REFERENCE.read_text())[case.name]
    assert len(reference["losses"]) == STEPS + 1

    def make(params: Any, **options: Any) -> HessianFree:
        return HessianFree(params, preset="seed", **options)

    run, losses, returned = trajectory(case, make)
    steps = solves = STEPS
    if case.is_sensitive:
        for scale in (1 + 1e-15, 1 - 1e-15, 1 + 1e-14, 1 - 1e-14):
            twin, others, _ = trajectory(case, make, scale)
            alike = (math.isclose(a, b, rel_tol=1e-9) for a, b in zip(losses[1:], others[1:]))
            steps = min(steps, first_difference(alike))
            solves = min(solves, first_difference(a == b for a, b in zip(ends(run), ends(twin))))
        assert min(steps, solves) >= 1

    def close(values: list[float], key: str) -> None:
        n = steps + (key == "losses")
        assert values[:n] == pytest.approx(reference[key][:n], rel=1e-8, abs=1e-8), key

    history = run.optimizer.history
    close(losses, "losses")
    close(returned, "losses_after")
    close([report.damping for report in history], "dampings")
    close([report.alpha for report in history], "alphas")
    # What a step did, beside what came of it.
    solves = min(solves, steps)
    iterations, chosen = zip(*ends(run))
    assert list(iterations[:solves]) == reference["cg_iterations"][:solves]
    if run.optimizer.options.use_cg_backtracking:
        assert list(chosen[:solves]) == reference["chosen_iterates"][:solves]


def first_difference(alike: Iterable[bool]) -> int:
    """How many agree before the first that do not."""
    return len(list(itertools.takewhile(bool, alike)))


def ends(run: Run) -> list[tuple[int, int]]:
    """Where CG ended in each step, and which iterate was taken."""
    return [(report.cg_iterations, report.chosen_iterate) for report in run.optimizer.history]


def trajectory(
    case: Case, make: Callable[..., HessianFree], scale: float = 1.0
) -> tuple[Run, list[float], list[float]]:
    """Take the steps from the case's start times `scale`: the run, the losses from the start on, and
    what the steps returned."""
    run = start(case, make, hfdist_preconditioner)
    with torch.no_grad():
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                p.mul_(scale)
    losses, returned = [run.loss()], []
    for _ in range(STEPS):
        returned.append(run.step())
        losses.append(run.loss())
    return run, losses, returned


SIGNATURES = {
    "__init__": {
        "params": inspect.Parameter.empty,
        "curvature_opt": "ggn",
        "damping": 1.0,
        "adapt_damping": True,
        "cg_max_iter": 250,
        "cg_decay_x0": 0.95,
        "use_cg_backtracking": True,
        "lr": 1.0,
        "use_linesearch": True,
        "verbose": False,
    },
    "step": {
        "forward": inspect.Parameter.empty,
        "grad": None,
        "mvp": None,
        "M_func": None,
        "test_deterministic": False,
    },
    "acc_step": {
        "model": inspect.Parameter.empty,
        "loss_func": inspect.Parameter.empty,
        "loss_datalist": inspect.Parameter.empty,
        "grad_datalist": None,
        "mvp_datalist": None,
        "M_func": None,
        "reduction": "mean",
        "test_deterministic": False,
    },
    "test_reduction": {
        "model": inspect.Parameter.empty,
        "loss_func": inspect.Parameter.empty,
        "datalist": inspect.Parameter.empty,
        "reduction": inspect.Parameter.empty,
    },
    "get_preconditioner": {
        "model": inspect.Parameter.empty,
        "loss_func": inspect.Parameter.empty,
        "inputs": inspect.Parameter.empty,
        "targets": inspect.Parameter.empty,
        "reduction": inspect.Parameter.empty,
        "exponent": None,
        "use_backpack": True,
    },
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_takes_the_seeds_arguments_in_the_seeds_order(method: str) -> None:
    """A call that PyTorchHessianFree accepts means the same here: names, order and defaults agree."""
    parameters = list(inspect.signature(getattr(HessianFree, method)).parameters.values())[1:]
    expected = SIGNATURES[method]
    positional = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == list(expected)
    for p in positional:
        if expected[p.name] is not inspect.Parameter.empty:
            assert p.default == expected[p.name], p.name
