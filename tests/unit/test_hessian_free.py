"""The optimizer in a loop of one's own: what PyTorchHessianFree's users do, and where it went wrong."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rules import CG, with_each_solver
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.hessian_free import HessianFree
from hfdist.optim.report import Stop


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def net(*, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(5, 8)]
    layers += [nn.BatchNorm1d(8)] if norm else []
    layers += [nn.Tanh()]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(3, (n,))


def closure(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def forward() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return nn.functional.cross_entropy(outputs, y), outputs

    return forward


def bits(tensors: Iterator[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# -- it optimizes


# The default rules take short solves, many steps.
@pytest.mark.parametrize(("rules", "steps"), [({}, 40), (CG, 10)], ids=["default", "cg"])
@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
def test_loss_falls_and_is_returned(curvature_opt: str, rules: Any, steps: int) -> None:
    model, (x, y) = net(), data()
    forward = closure(model, x, y)
    optimizer = HessianFree(model.parameters(), curvature_opt=curvature_opt, damping=0.1, **rules)
    before = forward()[0].item()
    losses = [optimizer.step(forward) for _ in range(steps)]
    assert losses[-1] < 0.1 * before
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(float(forward()[0]), rel=1e-12)
    assert optimizer.report is not None
    assert optimizer.report.final_loss == losses[-1]
    assert [r.final_loss for r in optimizer.history] == losses


@with_each_solver
def test_rosenbrock_without_a_model(rules: Any) -> None:
    xy = torch.tensor([-1.5, 2.0], dtype=torch.float64, requires_grad=True)

    def forward() -> tuple[Tensor, None]:
        x, y = xy
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2, None

    optimizer = HessianFree([xy], curvature_opt="hessian", damping=1e-2, **rules)
    for _ in range(60):
        loss = optimizer.step(forward)
    assert loss < 1e-12
    torch.testing.assert_close(xy.detach(), torch.ones(2).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [
        {"krylov_length": "full"},
        {"krylov_length": "full", "preconditioner": "none"},
        {**CG, "cg_stop": "residual", "cg_tol": 1e-12},
    ],
    ids=["default", "no metric", "cg"],
)
def test_least_squares_is_one_undamped_step(rules: Any) -> None:
    A, b = torch.randn(30, 6).double(), torch.randn(30, 1).double()
    layer = nn.Linear(6, 1, bias=False).double()

    def forward() -> tuple[Tensor, Tensor]:
        outputs = layer(A)
        return (outputs - b).square().mean(), outputs

    with pytest.warns(UserWarning, match="damping is 0"):
        optimizer = HessianFree(layer.parameters(), damping=0.0, **rules)
    optimizer.step(forward)
    solution = torch.linalg.lstsq(A, b).solution
    torch.testing.assert_close(layer.weight.detach().T, solution, rtol=1e-9, atol=1e-11)
    assert optimizer.report.reduction_ratio == pytest.approx(1.0)
    optimizer.step(forward)
    assert optimizer.damping == 0.0


def test_prints_nothing_and_logs(capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    model, (x, y) = net(), data()
    with caplog.at_level(logging.DEBUG, logger="hfdist"):
        HessianFree(model.parameters()).step(closure(model, x, y))
    assert capsys.readouterr() == ("", "")
    assert "CG iterations" in caplog.text


# -- nothing is evaluated twice


STATISTICS = [({}, 1), ({"preconditioner": "none"}, 0), (CG, 0)]
"""Rules, and forward passes of a step for statistics of the preconditioner."""
with_statistics = pytest.mark.parametrize(
    ("rules", "of_metric"), STATISTICS, ids=["default", "no metric", "cg"]
)


@with_statistics
@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
def test_one_forward_with_gradient_then_only_candidates(
    curvature_opt: str, rules: Any, of_metric: int
) -> None:
    model, (x, y) = net(), data()
    calls = 0

    def forward() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        outputs = model(x)
        return nn.functional.cross_entropy(outputs, y), outputs

    optimizer = HessianFree(model.parameters(), curvature_opt=curvature_opt, verify="off", **rules)
    for step in range(3):
        calls = 0
        optimizer.step(forward)
        assert calls == 1 + of_metric + optimizer.report.num_loss_evaluations
        if step == 0:  # from zero: f(0) is known, and so is the last iterate's loss at alpha = 1
            assert calls <= 1 + of_metric + len(optimizer.report.candidates)


@with_statistics
@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
def test_checks_cost_two_forward_passes_of_the_first_step(
    curvature_opt: str, rules: Any, of_metric: int
) -> None:
    model, (x, y) = net(), data()
    calls = 0

    def forward() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        outputs = model(x)
        return nn.functional.cross_entropy(outputs, y), outputs

    for verify, expected in (("first", [2, 0, 0]), ("always", [2, 2, 2]), ("off", [0, 0, 0])):
        optimizer = HessianFree(
            model.parameters(), curvature_opt=curvature_opt, verify=verify, **rules
        )
        for extra in expected:
            calls = 0
            optimizer.step(forward)
            assert calls == 1 + extra + of_metric + optimizer.report.num_loss_evaluations


@with_statistics
def test_acc_step_evaluates_each_minibatch_as_often(rules: Any, of_metric: int) -> None:
    model, (x, y) = net(), data()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    pairs = list(zip(x.split(6), y.split(6)))
    rules = {"preconditioner_examples": 1.0, **rules}  # a share may leave out a whole minibatch
    optimizer = HessianFree(model.parameters(), verify="off", **rules)
    optimizer.acc_step(model, nn.functional.cross_entropy, pairs)
    evaluations = 1 + of_metric + optimizer.report.num_loss_evaluations
    assert len(calls) == len(pairs) * evaluations


# -- acc_step is step on parts


# `step` sees a whole batch: statistics of a part of it are to be had of minibatches alone.
same_statistics = pytest.mark.parametrize(
    "rules", [{"preconditioner_examples": 1.0}, CG], ids=["default", "cg"]
)


@same_statistics
@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_acc_step_equals_step(curvature_opt: str, reduction: str, rules: Any) -> None:
    x, y = data()
    one, many = net(), net()
    many.load_state_dict(one.state_dict())
    loss = nn.CrossEntropyLoss(reduction=reduction)

    def forward() -> tuple[Tensor, Tensor]:
        outputs = one(x)
        return loss(outputs, y), outputs

    whole = HessianFree(one.parameters(), curvature_opt=curvature_opt, **rules)
    parts = HessianFree(many.parameters(), curvature_opt=curvature_opt, **rules)
    pairs = list(zip(x.split([10, 9, 5]), y.split([10, 9, 5])))
    for _ in range(5):
        expected = whole.step(forward)
        found = parts.acc_step(many, loss, iter(pairs), reduction=reduction)
        assert found == pytest.approx(expected, rel=1e-7)
    for p, q in zip(one.parameters(), many.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@same_statistics
def test_class_weights_and_ignored_targets_are_weighed_rightly(rules: Any) -> None:
    x, y = data()
    y[::4] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double())
    one, many = net(), net()
    many.load_state_dict(one.state_dict())

    def forward() -> tuple[Tensor, Tensor]:
        outputs = one(x)
        return loss(outputs, y), outputs

    expected = HessianFree(one.parameters(), **rules).step(forward)
    pairs = list(zip(x.split([11, 13]), y.split([11, 13])))
    found = HessianFree(many.parameters(), **rules).acc_step(many, loss, pairs)
    assert found == pytest.approx(expected, rel=1e-10)


def test_test_reduction() -> None:
    model, (x, y) = net(), data()
    pairs = list(zip(x.split(12), y.split(12)))
    optimizer = HessianFree(model.parameters())
    optimizer.test_reduction(model, nn.CrossEntropyLoss(), pairs, "mean")
    optimizer.test_reduction(model, nn.CrossEntropyLoss(reduction="sum"), pairs, "sum")
    with pytest.raises(RuntimeError, match="reduction='sum'"):
        optimizer.test_reduction(model, nn.CrossEntropyLoss(), pairs, "sum")


# -- what must not go wrong


@with_each_solver
def test_zero_gradient_is_a_rest(rules: Any) -> None:
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = HessianFree([p], curvature_opt="hessian", **rules)
    assert optimizer.step(lambda: (p.square().sum(), None)) == 0.0
    assert optimizer.report.stop is Stop.ZERO_GRADIENT
    assert (optimizer.report.alpha, optimizer.damping) == (0.0, 1.0)
    assert not p.any()


def test_exact_start_is_no_nan() -> None:
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = HessianFree(
        [p], curvature_opt="hessian", cg_decay_x0=1.0, adapt_damping=False, lr=0.0,
        use_linesearch=False, **CG,
    )  # fmt: skip
    forward = lambda: (p.square().sum(), None)  # noqa: E731
    optimizer.step(forward)
    optimizer.param_groups[0]["lr"] = 1.0
    p0 = p.detach().clone()
    optimizer.state[p]["x0"] = -p0 * 2 / 3  # solves (2 + 1) x = -2 p
    optimizer.param_groups[0]["has_x0"] = True
    optimizer.step(forward)
    assert optimizer.report.stop is Stop.EXACT_START
    torch.testing.assert_close(p.detach(), p0 / 3)


# By how much lambda rises, at most.
@pytest.mark.parametrize(("rules", "factor"), [({}, 4.0), (CG, 1.5)], ids=["default", "cg"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "product", "trial"])
def test_non_finite_values_leave_the_parameters_alone(
    bad: float, where: str, rules: Any, factor: float
) -> None:
    model, (x, y) = net(), data()
    before = bits(model.parameters())
    base = closure(model, x, y)

    def forward() -> tuple[Tensor, Tensor]:
        loss, outputs = base()
        if where == "loss" or (where == "trial" and not same(before, bits(model.parameters()))):
            loss = loss * bad
        return loss, outputs

    num_params = sum(p.numel() for p in model.parameters())
    values = torch.full((num_params,), bad, dtype=torch.float64)
    optimizer = HessianFree(model.parameters(), **rules)
    loss = optimizer.step(
        forward,
        grad=values if where == "gradient" else None,
        mvp=(lambda v: values) if where == "product" else None,
    )
    assert same(before, bits(model.parameters()))
    assert not optimizer.report.accepted
    assert 1.5 <= optimizer.damping <= factor
    if where != "loss":
        assert loss == pytest.approx(float(base()[0]))
    # And it goes on from there.
    assert optimizer.step(base) < float(torch.tensor(math.log(3) * 1.5))
    assert optimizer.report.accepted


@with_each_solver
@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_exception_in_mid_step_restores_parameters_and_buffers(after: int, rules: Any) -> None:
    model, (x, y) = net(norm=True), data()
    parameters, buffers = bits(model.parameters()), bits(model.buffers())
    base = closure(model, x, y)
    calls = 0

    def forward() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        return base()

    optimizer = HessianFree(model.parameters(), damping=1e-3, **rules)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(forward)
    assert same(parameters, bits(model.parameters()))
    assert same(buffers, bits(model.buffers()))
    assert optimizer.step(base) < 1.5


@with_each_solver
def test_a_rejected_step_leaves_every_bit(rules: Any) -> None:
    model, (x, y) = net(), data()
    before = bits(model.parameters())
    base = closure(model, x, y)

    def forward() -> tuple[Tensor, Tensor]:
        loss, outputs = base()
        return (loss if same(before, bits(model.parameters())) else loss + 10.0), outputs

    optimizer = HessianFree(model.parameters(), **rules)
    loss = optimizer.step(forward)
    report = optimizer.report
    assert not report.accepted
    assert same(before, bits(model.parameters()))
    assert (report.alpha, report.update_norm) == (0.0, 0.0)
    assert loss == report.final_loss == report.loss == pytest.approx(float(base()[0]))
    assert report.next_damping == optimizer.damping > report.damping
    # And it goes on from there.
    assert optimizer.step(base) < loss
    assert optimizer.report.accepted


@with_each_solver
def test_parameters_keep_storage_and_dtype(rules: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3).double())
    pointers = [p.data_ptr() for p in model.parameters()]
    dtypes = [p.dtype for p in model.parameters()]
    x, y = torch.randn(24, 5), torch.randint(3, (24,))

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model[1](torch.tanh(model[0](x)).double())
        return nn.functional.cross_entropy(outputs, y), outputs

    optimizer = HessianFree(model.parameters(), **rules)
    losses = [optimizer.step(forward) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p.dtype for p in model.parameters()] == dtypes


@with_each_solver
def test_unused_parameters_and_linear_losses(rules: Any) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(3, 3)}).double()
    x = torch.randn(10, 4).double()

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model["used"](x)
        return outputs.mean(), outputs  # linear: the GGN is zero, damping alone makes the step

    before = bits(model["unused"].parameters())
    optimizer = HessianFree(model.parameters(), cg_stop="residual", **rules)
    loss = float(forward()[0])
    assert optimizer.step(forward) < loss
    assert same(before, bits(model["unused"].parameters()))


def test_global_random_numbers_are_untouched() -> None:
    model, (x, y) = net(dropout=0.5), data()
    state = torch.get_rng_state()
    HessianFree(model.parameters()).step(closure(model, x, y))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_one_function_within_a_step_and_another_in_the_next() -> None:
    model, (x, y) = net(dropout=0.5), data()
    masks: list[Tensor] = []
    model[2].register_forward_hook(lambda _, __, out: masks.append((out == 0).clone()))
    optimizer = HessianFree(model.parameters())
    optimizer.step(closure(model, x, y))
    first = masks[:]
    masks.clear()
    optimizer.step(closure(model, x, y))
    assert len(first) > 1
    assert all(torch.equal(m, first[0]) for m in first)
    assert not torch.equal(masks[0], first[0])


def test_batch_norm_statistics_move_once_a_step() -> None:
    model, (x, y) = net(norm=True), data()
    optimizer = HessianFree(model.parameters())
    expected = copy.deepcopy(model)
    expected(x)  # a plain forward pass at the step's start
    optimizer.step(closure(model, x, y))
    assert int(model[1].num_batches_tracked) == 1
    torch.testing.assert_close(model[1].running_mean, expected[1].running_mean)
    torch.testing.assert_close(model[1].running_var, expected[1].running_var)


def test_attention_and_compiled_models() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).double()
    head = nn.Linear(8, 3).double()
    x, y = torch.randn(6, 4, 8).double(), torch.randint(3, (6,))

    def forward() -> tuple[Tensor, Tensor]:
        outputs = head(layer(x).mean(1))
        return nn.functional.cross_entropy(outputs, y), outputs

    optimizer = HessianFree([*layer.parameters(), *head.parameters()])
    losses = [optimizer.step(forward) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_determinism_check_warns_of_noise() -> None:
    model, (x, y) = net(), data()
    noise = iter(torch.linspace(0, 1, 1000).tolist())
    base = closure(model, x, y)

    def forward() -> tuple[Tensor, Tensor]:
        loss, outputs = base()
        return loss + next(noise), outputs

    with pytest.warns(UserWarning, match="two evaluations"):
        HessianFree(model.parameters(), verify="off").step(forward, test_deterministic=True)
    noise = iter(torch.linspace(0, 1, 1000).tolist())
    with pytest.raises(TaskError, match="two evaluations of the same loss differ"):
        HessianFree(model.parameters()).step(forward)


# -- groups, freezing


def test_groups_have_their_own_damping_and_weight_decay_in_cg() -> None:
    a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    optimizer = HessianFree(
        [{"params": [a], "damping_scale": 3.0}, {"params": [b], "weight_decay": 0.5}],
        curvature_opt="hessian",
        cg_stop="residual",
        cg_tol=1e-12,
        damping=1.0,
        **CG,
    )
    optimizer.step(lambda: ((a**2 + b**2).sum() / 2, None))
    # a: gradient 2, curvature 1 + 3; b: gradient 2 + 1, curvature 1 + 0.5 + 1.
    assert float(a) == pytest.approx(2 - 2 / 4)
    assert float(b) == pytest.approx(2 - 3 / 2.5)
    assert optimizer.report.loss == pytest.approx(2 + 2 + 0.5 * 0.5 * 4)


@pytest.mark.parametrize("lambda_", [0.5, 1.0])
def test_groups_have_their_own_damping_and_weight_decay_in_a_krylov_space(lambda_: float) -> None:
    a = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    optimizer = HessianFree(
        [{"params": [a], "damping_scale": 3.0}, {"params": [b], "weight_decay": 0.5}],
        curvature_opt="hessian",
        preconditioner="none",
        damping=lambda_,
        damping_rule="fixed",
    )
    optimizer.step(lambda: ((a**2 + b**2).sum() / 2, None))
    # The metric C is diag(3, 1), g is (2, 3) and B is diag(1, 1.5): the shift is lambda u'Bu / u'Cu C for
    # u = C^-1 g = (2/3, 3).
    shift = lambda_ * (4 / 9 + 1.5 * 9) / (3 * 4 / 9 + 9)
    assert float(a) == pytest.approx(2 - 2 / (1 + 3 * shift))
    assert float(b) == pytest.approx(2 - 3 / (1.5 + shift))
    assert optimizer.report.loss == pytest.approx(2 + 2 + 0.5 * 0.5 * 4)


@pytest.mark.parametrize("solver", ["auto", "krylov", "metric"])
def test_no_damping_of_a_group_is_an_error_where_it_is_the_metric(solver: str) -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "damping_scale": 0.0}]
    with pytest.raises(ValueError, match=r"damping_scale is 0.*solver='cg'"):
        HessianFree(groups, solver=solver)
    optimizer = HessianFree([{"params": [a]}, {"params": [b]}], "hessian", solver=solver)
    optimizer.param_groups[1]["damping_scale"] = 0.0
    with pytest.raises(ValueError, match="damping_scale is 0"):
        optimizer.step(lambda: ((a**2 + b**2).sum(), None))
    optimizer.param_groups[1]["frozen"] = True
    optimizer.step(lambda: ((a**2 + b**2).sum(), None))
    HessianFree([{"params": [a]}, {"params": [b], "damping_scale": 0.0}], "hessian", **CG).step(
        lambda: ((a**2 + b**2).sum(), None)
    )


@pytest.mark.parametrize("rules", [{"preconditioner": "none"}, CG], ids=["default", "cg"])
def test_weight_decay_is_in_loss_gradient_and_product(rules: Any) -> None:
    x, y = data()
    explicit, built_in = net(), net()
    built_in.load_state_dict(explicit.state_dict())

    def with_term() -> tuple[Tensor, Tensor]:
        outputs = explicit(x)
        penalty = sum(p.square().sum() for p in explicit.parameters())
        return nn.functional.cross_entropy(outputs, y) + 0.5 * 0.1 * penalty, outputs

    # The Hessian sees the penalty's curvature in both.
    one = HessianFree(explicit.parameters(), curvature_opt="hessian", damping=1.0, **rules)
    two = HessianFree(
        built_in.parameters(), curvature_opt="hessian", damping=1.0, weight_decay=0.1, **rules
    )
    for _ in range(3):
        assert two.step(closure(built_in, x, y)) == pytest.approx(one.step(with_term), rel=1e-9)


@with_each_solver
def test_added_groups_are_trained_and_frozen_ones_are_not(rules: Any) -> None:
    model, (x, y) = net(), data()
    optimizer = HessianFree(model[0].parameters(), **rules)
    optimizer.step(closure(model, x, y))
    head = bits(model[2].parameters())
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.step(closure(model, x, y))
    assert not same(head, bits(model[2].parameters()))
    body = bits(model[0].parameters())
    optimizer.param_groups[0]["frozen"] = True
    optimizer.step(closure(model, x, y))
    assert same(body, bits(model[0].parameters()))


@with_each_solver
def test_freezing_and_unfreezing_between_steps(rules: Any) -> None:
    model, (x, y) = net(), data()
    model[0].weight.requires_grad_(False)
    optimizer = HessianFree(model.parameters(), **rules)
    forward = closure(model, x, y)
    frozen = model[0].weight.clone()
    optimizer.step(forward)
    assert torch.equal(model[0].weight, frozen)
    model[0].weight.requires_grad_(True)
    optimizer.step(forward)
    assert not torch.equal(model[0].weight, frozen)
    model[2].bias.requires_grad_(False)
    bias = model[2].bias.clone()
    optimizer.step(forward)
    assert torch.equal(model[2].bias, bias)


def test_nothing_to_train_is_an_error() -> None:
    model = net().requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        HessianFree(model.parameters())


# -- state


@with_each_solver
def test_state_dict_carries_everything(rules: Any) -> None:
    x, y = data()
    model = net(dropout=0.3)
    optimizer = HessianFree(model.parameters(), damping=0.5, linesearch_c=0.02, **rules)
    forward = closure(model, x, y)
    for _ in range(3):
        optimizer.step(forward)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    other_model = net(dropout=0.3)
    other = HessianFree(other_model.parameters())
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert (other.damping, other.options.linesearch_c) == (optimizer.damping, 0.02)
    expected = [optimizer.step(forward) for _ in range(3)]
    found = [other.step(closure(other_model, x, y)) for _ in range(3)]
    assert found == expected
    assert same(bits(model.parameters()), bits(other_model.parameters()))


def test_state_works_with_distributed_checkpoints_helpers() -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    x, y = data()
    model, other_model = net(), net()
    optimizer = HessianFree(model.parameters(), damping=0.5)
    other = HessianFree(other_model.parameters())
    for _ in range(2):
        optimizer.step(closure(model, x, y))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    get_state_dict(other_model, other)  # as a fresh process does, to know the layout
    set_state_dict(
        other_model,
        other,
        model_state_dict=copy.deepcopy(model_state),
        optim_state_dict=copy.deepcopy(optimizer_state),
    )
    assert other.damping == optimizer.damping
    assert other.step(closure(other_model, x, y)) == optimizer.step(closure(model, x, y))


# -- preconditioner


def test_preconditioner_takes_fewer_iterations_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(20, 3)).double()
    with torch.no_grad():
        model[0].weight.zero_()  # undecided outputs: the empirical Fisher is close to the GGN
    scales = torch.logspace(-2, 2, 20).double()
    x, y = torch.randn(200, 20).double() * scales, torch.randint(3, (200,))
    rules = {"damping": 1e-4, "cg_stop": "residual", "cg_tol": 1e-6, **CG}
    optimizer = HessianFree(model.parameters(), **rules)
    modules = {name: set(vars(m)) for name, m in model.named_modules()}
    M = optimizer.get_preconditioner(model, nn.CrossEntropyLoss(), x, y, "mean", exponent=1.0)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == modules
    assert all(p.grad is None for p in model.parameters())
    twin_model = copy.deepcopy(model)
    twin = HessianFree(twin_model.parameters(), **rules)
    twin.step(closure(twin_model, x, y))
    optimizer.step(closure(model, x, y), M_func=M)
    assert optimizer.report.cg_iterations < 0.8 * twin.report.cg_iterations


def test_a_preconditioner_of_ones_own_is_the_metric_of_a_krylov_space() -> None:
    a = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
    C = torch.tensor([1.0, 100.0], dtype=torch.float64)
    optimizer = HessianFree([a], curvature_opt="hessian")
    loss = optimizer.step(lambda: ((C * a**2).sum() / 2, None), M_func=lambda v: v / C)
    assert optimizer.report.cg_iterations == 1, "C^-1 B is the identity"
    assert loss < 1e-3


def test_unknown_option_names_itself() -> None:
    with pytest.raises(ValueError, match="dampling"):
        HessianFree(net().parameters(), dampling=1.0)


@pytest.mark.parametrize("returned", ["loss", (1.0, None), (torch.ones(2), None)])
def test_bad_forward_says_what_it_must_return(returned: Any) -> None:
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="forward\\(\\) must return"):
        HessianFree([p], curvature_opt="hessian").step(lambda: returned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_few_bits_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    with pytest.raises(ValueError, match=f"{dtype}.*product_autocast='bfloat16'"):
        HessianFree(model.parameters())
    model.bias.data = model.bias.data.float()  # solver and steps are in the widest type
    HessianFree(model.parameters())


def test_a_state_of_a_version_with_fewer_options_is_loaded() -> None:
    model = nn.Linear(3, 2)
    optimizer = HessianFree(model.parameters(), damping=0.5)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["capture_products"]
    optimizer.load_state_dict(state)
    assert optimizer.options.capture_products is False
    assert optimizer.options.damping == 0.5
