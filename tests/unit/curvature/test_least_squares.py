"""Solvers of residuals: the same step as CG run to convergence, serial and on ranks; tasks in terms."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import dense
import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from hfdist.comm import Communicator, SerialCommunicator
from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Problem, Regularisation, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.data.config import BatchesConfig
from hfdist.data.points import TermSize, plan_points
from hfdist.errors import ConfigError, DataError, TaskError
from hfdist.optim.options import HFOptions
from hfdist.optim.step import HFState, hf_step
from hfdist.tasks.residuals import Part, PointSets, ResidualTask, Term
from hfdist.tasks.robust import LOSSES, residual_loss, weights

EXACT: dict[str, Any] = {
    "cg_stop": "residual",
    "cg_tol": 1e-14,
    "cg_max_iter": 3000,
    "use_cg_backtracking": False,
    "geodesic_acceleration": False,
    "use_linesearch": False,
}


class Equation(ResidualTask):
    """-u'' = f on sets of points of unequal size, with targets, weights and robust losses."""

    def __init__(self, loss: str = "squares", outputs: int = 1, boundary: int = 2) -> None:
        self.loss_name, self.outputs, self.boundary = loss, outputs, boundary

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, self.outputs)).double()

    def interior(self, model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = model(x)
        columns = []
        for k in range(self.outputs):
            (du,) = torch.autograd.grad(u[:, k].sum(), x, create_graph=True)
            (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
            columns.append(ddu[:, 0] + u[:, k] - torch.sin(3 * x[:, 1]))
        return torch.stack(columns, 1)

    def terms(self) -> list[Term]:
        g = torch.Generator().manual_seed(5)
        x = torch.rand(9, 2, generator=g, dtype=torch.float64)
        y = torch.randn(9, self.outputs, generator=g, dtype=torch.float64)
        return [
            Term(
                name="interior",
                points=lambda g: torch.rand(7, 2, generator=g, dtype=torch.float64),
                residuals=self.interior,
                weight=2.0,
                every_step=True,
            ),
            Term(
                name="boundary",
                points=torch.rand(self.boundary, 2, generator=g, dtype=torch.float64),
                residuals=lambda model, x: model(x),
            ),
            Term(
                name="data",
                points=(x, y),
                residuals=lambda model, points: model(points[0]) - points[1],
                weight=0.5,
                loss=self.loss_name,
                scale=0.8,
                microbatch=4,
            ),
        ]


def problem_of(
    task: ResidualTask,
    comm: Communicator,
    step: int = 0,
    *,
    row_solver: bool = True,
    **settings: Any,
) -> Problem:
    model = task.model()
    torch.manual_seed(3)
    data = task.train_data()
    sizes = [
        TermSize(num_points=n, microbatch=t.microbatch, every_step=t.every_step)
        for t, n in zip(data.terms, data.sizes)
    ]
    plan = plan_points(
        BatchesConfig(), sizes, step=step, rank=comm.rank, world_size=comm.world_size
    )
    role = [
        from_task(task, model, data.points(m.term, m.draw, m.indices), m.number)  # type: ignore[arg-type]
        for m in plan.gradient.microbatches
    ]
    return Problem(
        **{
            "params": ParameterVector(model.parameters()),
            "roles": Roles(gradient=role, curvature=role, loss=role),
            "comm": comm,
            "frozen": FixedRandomness(torch.device("cpu"), model),
            "residuals": True,
            "row_solver": row_solver,
            "engine": ProductEngine(),
            **settings,
        }
    )


def step_of(
    comm: Communicator,
    solver: str,
    args: dict[str, Any],
    weight_decay: float,
    options: dict[str, Any],
) -> tuple[Tensor, float, float]:
    """Where a step from a fixed start ends [P], its loss, and lambda after it."""
    problem = problem_of(
        Equation(**args),
        comm,
        row_solver=solver != "cg",
        regularisation=Regularisation(weight_decay=weight_decay),
    )
    report, state = hf_step(
        problem,
        HFState(damping=2.0, explore=False),
        HFOptions(solver=solver, weight_decay=weight_decay, **{**EXACT, **options}),
    )
    return problem.params.read(), report.final_loss, state.damping


@pytest.mark.parametrize("solver", ["dense", "sample_space"])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("args", [{}, {"loss": "huber"}, {"loss": "cauchy", "outputs": 2}])
def test_a_step_is_that_of_converged_cg(
    solver: str, weight_decay: float, args: dict[str, Any]
) -> None:
    comm = SerialCommunicator()
    expected, loss, _ = step_of(comm, "cg", args, weight_decay, {})
    theta, own_loss, _ = step_of(comm, solver, args, weight_decay, {})
    torch.testing.assert_close(theta, expected, rtol=1e-8, atol=1e-9)
    assert own_loss == pytest.approx(loss, rel=1e-10)


@pytest.mark.ranks
@pytest.mark.parametrize("solver", ["dense", "sample_space", "cg"])
def test_ranks_take_the_serial_step(solver: str) -> None:
    """Also where a rank has no points of a term, or none at all."""
    options = {"geodesic_acceleration": True, "use_linesearch": True}
    for args in ({"boundary": 1}, {"outputs": 2}):
        serial = step_of(SerialCommunicator(), solver, args, 1e-3, options)
        for world_size in (2, 3):
            for theta, loss, damping in on_ranks(world_size, step_of, solver, args, 1e-3, options):
                torch.testing.assert_close(theta, serial[0], rtol=1e-8, atol=1e-9)
                assert (loss, damping) == pytest.approx(serial[1:], rel=1e-8)


def steps_of_ranks(comm: Communicator) -> list[tuple[Tensor, float, float]]:
    """Of JJ' [17, 17] by products, with a sketch of rank 4 and of full rank."""
    options = {"geodesic_acceleration": True}
    return [
        step_of(comm, "sample_space", {"boundary": 1}, 1e-3, {**options, "sample_rank": rank})
        for rank in (4, 17)
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_of_a_rank_is_the_exact_one(world_size: int) -> None:
    """To what the default `sample_tolerance` leaves, and of full rank to rounding; also where a rank of the
    workers has no points of a term."""
    options = {"geodesic_acceleration": True}
    serial = SerialCommunicator()
    expected, loss, _ = step_of(serial, "sample_space", {"boundary": 1}, 1e-3, options)
    alone = world_size == 1
    for found in [steps_of_ranks(serial)] if alone else on_ranks(world_size, steps_of_ranks):
        for (theta, own_loss, _), tolerance in zip(found, (1e-6, 1e-8)):
            torch.testing.assert_close(theta, expected, rtol=tolerance, atol=tolerance)
            assert own_loss == pytest.approx(loss, rel=tolerance)


def one_point(comm: Communicator) -> Tensor:
    """Of three ranks, two have nothing."""

    class OnePoint(Equation):
        def terms(self) -> list[Term]:
            return [super().terms()[1]]

    problem = problem_of(OnePoint(boundary=1), comm)
    hf_step(problem, HFState(damping=0.1), HFOptions(solver="sample_space"))
    return problem.params.read()


@pytest.mark.ranks
def test_ranks_without_any_point() -> None:
    serial = one_point(SerialCommunicator())
    for theta in on_ranks(3, one_point):
        torch.testing.assert_close(theta, serial, rtol=1e-8, atol=1e-9)


def test_rows_are_those_of_the_objective() -> None:
    """J'J is the product's matrix, J'r the gradient, |r|^2 / 2 the loss."""
    problem = problem_of(Equation(outputs=2), SerialCommunicator())
    loss, g = problem.loss_and_gradient()
    ls = problem.least_squares
    assert ls is not None
    assert ls.num_residuals == 2 * (7 + 2 + 9)
    r = ls.residuals()
    assert 0.5 * float(r @ r) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(ls.transposed_times(r), g, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ls.gradient(), g, rtol=1e-10, atol=1e-12)
    B = problem.curvature()
    G = torch.stack([B(e).clone() for e in torch.eye(problem.numel, dtype=torch.float64)])
    torch.testing.assert_close(ls.gram(), G, rtol=1e-9, atol=1e-11)
    v = torch.linspace(-1, 1, problem.numel, dtype=torch.float64)
    Jv = ls.times(v)
    torch.testing.assert_close(ls.transposed_times(Jv), G @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(float(Jv @ Jv), float(v @ G @ v))
    K = ls.kernel()
    torch.testing.assert_close(K @ r, ls.times(g), rtol=1e-9, atol=1e-11)
    W = torch.stack((r, r.flip(0)), 1)
    torch.testing.assert_close(ls.kernel_times(W), K @ W, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ls.kernel_times(r), K @ r, rtol=1e-9, atol=1e-11)


def test_what_is_not_linear_in_the_residuals() -> None:
    """r(theta + v) - r - Jv, with r at theta + v by its own pass."""
    problem = problem_of(Equation(), SerialCommunicator())
    problem.loss_and_gradient()
    ls = problem.least_squares
    assert ls is not None
    v = torch.linspace(-0.3, 0.5, problem.numel, dtype=torch.float64)
    with problem.params.at(problem.params.read() + v):
        twin = Problem(
            params=problem.params, roles=problem.roles, residuals=True, frozen=problem.frozen
        )
        assert twin.least_squares is not None
        there = twin.least_squares.residuals()
    expected = there - ls.residuals() - ls.times(v)
    torch.testing.assert_close(ls.remainder(v), expected, rtol=1e-10, atol=1e-12)
    same = ls.remainder(v, ls.times(v))
    torch.testing.assert_close(same, expected, rtol=1e-10, atol=1e-12)
    small = 1e-4 * v
    assert float(ls.remainder(small).norm()) < 1e-6 * float(expected.norm())


def test_acceleration_and_its_correction_save_steps() -> None:
    finals = []
    for options in ({"geodesic_acceleration": False}, {"geodesic_corrections": 0}, {}):
        problem, state = (
            problem_of(Equation(), SerialCommunicator()),
            HFState(damping=1.0, explore=False),
        )
        for _ in range(12):
            again = Problem(
                params=problem.params, roles=problem.roles, residuals=True, row_solver=True
            )
            report, state = hf_step(again, state, HFOptions(solver="dense", **options))  # type: ignore[arg-type]
        finals.append(report.final_loss)
    assert finals == sorted(finals, reverse=True)
    assert finals[2] < finals[1] < finals[0]


def test_rows_that_do_not_fit_are_computed_anew() -> None:
    kept = problem_of(Equation(), SerialCommunicator())
    row = kept.numel * 8
    again = problem_of(
        Equation(), SerialCommunicator(), engine=ProductEngine(memory_budget=9 * row)
    )
    results = []
    for problem in (kept, again):
        problem.loss_and_gradient()
        ls = problem.least_squares
        assert ls is not None
        v = torch.linspace(-1, 1, problem.numel, dtype=torch.float64)
        results.append(torch.cat((ls.times(v), ls.transposed_times(ls.residuals()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    # Twice half of them: a forward pass, a backward pass and at most a third for J'r.
    assert 1.0 <= again.costs.rows - kept.costs.rows < 1.34


@pytest.mark.parametrize(
    ("solver", "budget", "words"),
    [
        ("dense", 100, "term 'interior' of Equation: 7 residuals of 21 parameters take"),
        ("dense", 7 * 21 * 8, "21 x 21 parameters"),
        ("sample_space", 7 * 21 * 8, "18 x 18 residuals"),
    ],
)
def test_more_than_memory(solver: str, budget: int, words: str) -> None:
    problem = problem_of(
        Equation(), SerialCommunicator(), engine=ProductEngine(memory_budget=budget)
    )
    before = problem.params.read()
    with pytest.raises(ConfigError, match=words):
        hf_step(problem, HFState(damping=1.0), HFOptions(solver=solver))
    assert torch.equal(problem.params.read(), before)


def test_a_rank_takes_less_memory_than_the_matrix() -> None:
    """Where JJ' [18, 18] is refused, a sketch of it is not; and where that does not fit, the message says
    so."""
    steps = {}
    for rank, rows in ((2, 12), (2, 1000), (None, 1000)):
        budget = rows * 21 * 8  # of rows of J; the matrix needs 47 of them
        problem = problem_of(
            Equation(), SerialCommunicator(), engine=ProductEngine(memory_budget=budget)
        )
        options = HFOptions(solver="sample_space", sample_rank=rank, sample_tolerance=1e-12)
        hf_step(problem, HFState(damping=1.0), options)
        steps[rank, rows] = problem.params.read()
    for theta in steps.values():
        torch.testing.assert_close(theta, steps[None, 1000], rtol=1e-8, atol=1e-9)
    problem = problem_of(
        Equation(), SerialCommunicator(), engine=ProductEngine(memory_budget=7 * 21 * 8)
    )
    words = r"a sketch of rank 12 of 18 residuals takes .*: lower optim.sample_rank \(below 12\)"
    with pytest.raises(ConfigError, match=words):
        hf_step(problem, HFState(damping=1.0), HFOptions(solver="sample_space", sample_rank=12))


class AtTheEdge(Equation):
    def interior(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(x)[:, 0] + torch.sqrt(x[:, 0] - 0.5)


def test_a_residual_that_is_not_finite_is_named() -> None:
    problem = problem_of(AtTheEdge(), SerialCommunicator())
    with pytest.raises(TaskError, match=r"term 'interior' of AtTheEdge: \d of 7 residuals are NaN"):
        problem.loss_and_gradient()


@pytest.mark.parametrize("name", LOSSES)
def test_robust_losses(name: str) -> None:
    r = torch.linspace(-4, 4, 33, dtype=torch.float64).requires_grad_()
    for scale in (1.0, 2.5):
        (slope,) = torch.autograd.grad(residual_loss(r, name, scale), r)
        torch.testing.assert_close(slope, weights(r.detach(), name, scale) * r.detach())
    near = torch.tensor([1e-4], dtype=torch.float64)
    assert float(residual_loss(near, name)) == pytest.approx(0.5e-8, rel=1e-6)
    assert float(residual_loss(torch.tensor([50.0]), name)) <= 1250.0


def test_robust_losses_shrug_off_outliers() -> None:
    """A line through points of which one is far off."""
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).unsqueeze(1)
    y = 3.0 * x + 1.0
    y[4] = 40.0

    class Line(ResidualTask):
        def __init__(self, loss: str) -> None:
            self.loss_name = loss

        def model(self) -> nn.Module:
            torch.manual_seed(0)
            return nn.Linear(1, 1).double()

        def terms(self) -> list[Term]:
            return [
                Term(
                    name="data",
                    points=(x, y),
                    residuals=lambda model, p: model(p[0]) - p[1],
                    loss=self.loss_name,
                    scale=0.1,
                )
            ]

    slopes = {}
    for loss in ("squares", "cauchy"):
        problem, state = problem_of(Line(loss), SerialCommunicator()), HFState(damping=1.0)
        for _ in range(40):
            again = Problem(
                params=problem.params, roles=problem.roles, residuals=True, row_solver=True
            )
            _, state = hf_step(again, state, HFOptions(solver="dense"))
        slopes[loss] = float(problem.params.read()[0])
    assert slopes["cauchy"] == pytest.approx(3.0, abs=1e-2)
    assert abs(slopes["squares"] - 3.0) > 0.5


# -- terms -----------------------------------------------------------------------------------------


def test_points_are_a_function_of_seed_and_step() -> None:
    term = Term(
        name="a",
        points=lambda g: torch.rand(3, 1, generator=g),
        residuals=lambda m, x: x,
        every_step=True,
    )
    everything = torch.arange(3)
    one, two = PointSets([term], 1), PointSets([term], 2)
    draws = [one.points(0, step, everything)[1] for step in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], two.points(0, 0, everything)[1])


def test_every_rank_takes_whole_microbatches_and_all_points_once() -> None:
    sizes = [
        TermSize(num_points=n, microbatch=m, every_step=False)
        for n, m in ((10, 4), (1, None), (7, None))
    ]
    for world_size in (1, 2, 3, 5):
        seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for rank in range(world_size):
            plan = plan_points(
                BatchesConfig(), sizes, step=4, rank=rank, world_size=world_size
            ).gradient
            for m in plan.microbatches:
                assert m.term is not None
                seen[m.term] += m.indices.tolist()
        assert {k: sorted(v) for k, v in seen.items()} == {
            0: list(range(10)),
            1: [0],
            2: list(range(7)),
        }


def test_a_fraction_of_the_points_for_the_curvature() -> None:
    sizes = [TermSize(num_points=10, microbatch=None, every_step=False)]
    plan = plan_points(BatchesConfig(curvature=0.35), sizes, step=0, rank=0, world_size=1)
    assert [len(m.indices) for m in plan.curvature.microbatches] == [4]


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ({"gradient": 5}, "batches.gradient is set"),
        ({"line_search": 5}, "batches.line_search is set"),
        ({"curvature": 5}, "give a fraction"),
    ],
)
def test_batches_that_do_not_fit_terms(batches: dict[str, int], words: str) -> None:
    sizes = [TermSize(num_points=10, microbatch=None, every_step=False)]
    with pytest.raises(ConfigError, match=words):
        plan_points(BatchesConfig(**batches), sizes, step=0, rank=0, world_size=1)


def term(**changes: Any) -> Term:
    return Term(**{"name": "t", "points": torch.rand(3, 1), "residuals": lambda m, x: x, **changes})


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: term(weight=0.0), TaskError, "weight is 0.0"),
        (lambda: term(weight=math.nan), TaskError, "weight is nan"),
        (lambda: term(scale=-1.0), TaskError, "scale is -1.0"),
        (lambda: term(loss="l3"), TaskError, "must be one of squares, huber"),
        (lambda: term(microbatch=0), TaskError, "microbatch is 0"),
        (lambda: term(every_step=True), TaskError, "every_step needs points that are drawn"),
        (lambda: PointSets([], 0), TaskError, "no term"),
        (lambda: PointSets([term(), term()], 0), TaskError, "two terms of one name"),
        (lambda: PointSets([term(points=torch.zeros(0, 2))], 0), DataError, "has no points"),
        (lambda: PointSets([term(points=3)], 0), DataError, "its points are a int"),
        (
            lambda: PointSets([term(points=(torch.zeros(2), torch.zeros(3)))], 0),
            DataError,
            r"\[2, 3\] points",
        ),
    ],
)
def test_terms_that_make_no_sense(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_number_of_points_that_changes() -> None:
    sizes = iter((3, 4))
    data = PointSets([term(points=lambda g: torch.rand(next(sizes), 1), every_step=True)], 0)
    with pytest.raises(DataError, match="draws 4 points in step 1, 3 in the first"):
        data.points(0, 1, torch.arange(3))


@pytest.mark.parametrize("residuals", [lambda m, x: x.sum(), lambda m, x: x[:2], lambda m, x: None])
def test_residuals_have_a_row_a_point(residuals: Any) -> None:
    task = Equation()
    part = Part(term(residuals=residuals), 1.0, 1.0)
    with pytest.raises(TaskError, match="return a tensor with a row a point"):
        task.forward(nn.Linear(1, 1), (part, torch.rand(3, 1)))


def test_dense_without_residuals_writes_out_the_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
    finals = []
    for solver in ("cg", "dense"):
        from hfdist import HessianFree

        twin = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        twin.load_state_dict(model.state_dict())
        optimizer = HessianFree(
            twin.parameters(), solver=solver, adapt_damping=False, **EXACT
        )  # one lambda
        finals.append(optimizer.acc_step(twin, nn.functional.cross_entropy, [(x, y)]))
    assert finals[1] == pytest.approx(finals[0], rel=1e-9)


def test_truth_is_dense() -> None:
    """The gram matrix against Jacobians by loops over autograd."""
    task = Equation()
    problem = problem_of(task, SerialCommunicator())
    problem.loss_and_gradient()
    ls = problem.least_squares
    assert ls is not None
    torch.manual_seed(3)
    data, model = task.train_data(), task.model()
    rows = []
    for k, n in enumerate(data.sizes):
        part, points = data.points(k, 0, torch.arange(n))
        z = part.term.residuals(model, points)
        J = dense.jacobian(z, list(model.parameters()))
        rows.append(math.sqrt(part.term.weight / n) * J)
    J = torch.cat(rows)
    torch.testing.assert_close(ls.gram(), J.T @ J, rtol=1e-10, atol=1e-12)


# -- momentum ------------------------------------------------------------------------------------------

MOMENTUM: dict[str, Any] = {**EXACT, "solver": "sample_space", "momentum": True}


class Kept(Equation):
    """The same model for every step."""

    def __init__(self) -> None:
        super().__init__()
        self._model = super().model()

    def model(self) -> nn.Module:
        return self._model


def explicit(task: ResidualTask, step: int) -> tuple[Tensor, Tensor]:
    """r [N] and J [N, P] of a step's points, by torch alone."""
    model = task.model()
    torch.manual_seed(3)
    data = task.train_data()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def residuals(theta: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in shapes])
        values = {name: piece.view(s) for name, piece, s in zip(names, pieces, shapes)}

        def moved(x: Tensor) -> Tensor:
            return torch.func.functional_call(model, values, (x,))

        found = []
        for k, (term, n) in enumerate(zip(data.terms, data.sizes)):
            _, points = data.points(k, step if term.every_step else 0, torch.arange(n))
            r = term.residuals(moved, points)  # type: ignore[arg-type]
            found.append((term.weight / n) ** 0.5 * r.reshape(-1))
        return torch.cat(found)

    return residuals(theta), torch.autograd.functional.jacobian(residuals, theta)  # type: ignore[no-untyped-call]


def steps_with_momentum(comm: Communicator, decay: float = 0.0) -> list[Tensor]:
    """Parameters before and after each of three steps."""
    task, options = Kept(), HFOptions(**MOMENTUM, weight_decay=decay)
    state, path = HFState(damping=2.0, explore=False), []
    for step in range(3):
        problem = problem_of(task, comm, step, regularisation=Regularisation(weight_decay=decay))
        path.append(problem.params.read().clone())
        report, state = hf_step(problem, state, options)
        assert report.num_loss_evaluations == 1  # the step's own lambda: no other was tried
        state = dataclasses.replace(state, damping=2.0)
    path.append(problem.params.read().clone())
    return path


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_momentum_is_the_minimiser_of_spring(decay: float) -> None:
    """x = argmin |Jx + r|^2 + decay |theta + x|^2 + lambda |x - mu x_before|^2, with mu = cg_decay_x0."""
    path = steps_with_momentum(SerialCommunicator(), decay)
    task, mu, lam = Kept(), HFOptions().cg_decay_x0, 2.0
    before = torch.zeros_like(path[0])
    for step, (theta, moved) in enumerate(itertools.pairwise(path)):
        torch.nn.utils.vector_to_parameters(theta, task.model().parameters())
        r, J = explicit(task, step)
        A = J.T @ J + (decay + lam) * torch.eye(len(theta), dtype=theta.dtype)
        x = torch.linalg.solve(A, -J.T @ r - decay * theta + lam * mu * before)
        torch.testing.assert_close(moved - theta, x, rtol=1e-8, atol=1e-10)
        before = x
    plain = dataclasses.replace(HFOptions(**MOMENTUM, weight_decay=decay), momentum=False)
    problem = problem_of(Kept(), SerialCommunicator())
    _, state = hf_step(problem, HFState(damping=2.0, explore=False), plain)
    assert state.x0 is None


@pytest.mark.ranks
def test_momentum_on_ranks_is_the_serial_one() -> None:
    serial = steps_with_momentum(SerialCommunicator())
    for path in on_ranks(2, steps_with_momentum):
        for theta, expected in zip(path, serial):
            torch.testing.assert_close(theta, expected, rtol=1e-8, atol=1e-10)


def first_step(
    comm: Communicator, solver: str, damping: float, options: dict[str, Any]
) -> tuple[Tensor, float, float, list[float]]:
    """Where it ends, its loss, lambda after it; and the loss after a plain step of each lambda."""
    problem = problem_of(Equation(), comm)
    problem.loss_and_gradient()
    ls = problem.least_squares
    assert ls is not None
    A, b = ls.gram(), -ls.gradient()
    eye = torch.eye(len(b), dtype=b.dtype)
    steps = [torch.linalg.solve(A + damping * 10.0**-k * eye, b) for k in range(8)]
    losses = problem.losses((1.0, step) for step in steps)
    again = problem_of(Equation(), comm)
    state = HFState(damping=damping)
    report, state = hf_step(again, state, HFOptions(solver=solver, **options))  # type: ignore[arg-type]
    return again.params.read().clone(), report.final_loss, state.damping, losses


@pytest.mark.parametrize("solver", ["dense", "sample_space"])
def test_the_first_step_goes_to_smaller_lambda_while_the_loss_falls(solver: str) -> None:
    serial, options = SerialCommunicator(), {"geodesic_acceleration": False}
    _, loss, following, losses = first_step(serial, solver, 1e4, options)
    k = next(k for k in range(8) if k == 7 or not losses[k + 1] < losses[k])
    assert 2 <= k < 7
    assert loss == pytest.approx(losses[k], rel=1e-9)
    assert 1e4 / following == pytest.approx(10.0**k, rel=1e-9) or 1e4 / following == pytest.approx(
        3 * 10.0**k, rel=1e-9
    )
    # Fixed damping, and a lambda that is too small already, stay.
    _, loss, following, _ = first_step(serial, solver, 1e4, {**options, "adapt_damping": False})
    assert (loss, following) == (pytest.approx(losses[0], rel=1e-9), 1e4)


@pytest.mark.ranks
def test_ranks_find_the_same_first_lambda() -> None:
    theta, loss, following, _ = first_step(SerialCommunicator(), "dense", 1e4, {})
    for other, other_loss, other_following, _ in on_ranks(2, first_step, "dense", 1e4, {}):
        torch.testing.assert_close(other, theta, rtol=1e-7, atol=1e-9)
        assert (other_loss, other_following) == (pytest.approx(loss), pytest.approx(following))
