"""The comparison of optimizers: one loss for all, work counted, grids kept, every rival runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hfdist
from hfdist.bench.optimizers.arena import Arena, Budget, race
from hfdist.bench.optimizers.curve import Curve, Update
from hfdist.bench.optimizers.hessian_free import BEST, GRID, NAME, hessian_free
from hfdist.bench.optimizers.problems import COMPARISONS, named
from hfdist.bench.optimizers.rivals import enter, rivals
from hfdist.bench.optimizers.study import Study, compare
from hfdist.bench.optimizers.tables import first_places, own_ratios, rows, thresholds_of
from hfdist.cli.app import app
from hfdist.config.job import RunConfig, from_dict, with_overrides
from hfdist.errors import ConfigError
from hfdist.tasks.loading import load_task

SMALL = "hfdist.tasks.small_net:SmallNet"
LINES = "hfdist.tasks.sequences:TextTransformer"


def job(task: str = SMALL, **values: Any) -> RunConfig:
    sizes = {SMALL: {"examples": 40}, LINES: {"examples": 12, "width": 8, "layers": 1}}
    values.setdefault("task_args", sizes.get(task, {}))
    return from_dict({"task": task, "device": "cpu", **values})


def curve(losses: list[float], name: str = "Adam", setting: str = "lr 1", seed: int = 0) -> Curve:
    made = Curve(optimizer=name, setting=setting, seed=seed)
    for loss in losses[:-1]:
        made.add(Update(loss=loss, work=2.0), seconds=0.5)
    made.losses.append(losses[-1])
    return made


# -- the common problem --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [SMALL, LINES])
def test_rivals_see_the_loss_and_gradient_of_hessian_free(task: str) -> None:
    """Microbatches, weights of padded tokens and the L2 term included."""
    config = job(
        task,
        dtype="float64",
        batches={"microbatch": 5},
        optim={"weight_decay": 0.1, "cg_max_iter": 2},
    )
    arena = Arena(config)
    assert len(arena.batches) > 1
    run = hessian_free(config)
    model = arena.model()
    for p, q in zip(model.parameters(), run.model.parameters()):
        assert torch.equal(p, q)
    loss = arena.gradient(model)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert arena.loss(model) == pytest.approx(loss, rel=1e-12)
    update = next(run.updates)
    assert update.loss == pytest.approx(loss, rel=1e-10)
    assert arena.loss(run.model) < loss
    report = hfdist.HessianFree(model.parameters(), damping=1.0, weight_decay=0.1)
    report.acc_step(
        lambda batch: arena.task.forward(model, batch),
        lambda outputs, batch: arena.task.loss(outputs, batch),
        [(batch, batch) for batch in arena.batches],
    )
    assert report.report is not None
    assert report.report.grad_norm == pytest.approx(norm, rel=1e-10)


def test_a_loss_that_is_a_sum_is_one() -> None:
    config = job("hfdist.tasks.small_net:SmallNet")
    arena = Arena(config)
    mean = arena.loss(arena.model())
    arena.task.loss_reduction = "sum"
    arena._known_weight = 1.0
    assert arena.loss(arena.model()) == pytest.approx(mean, rel=1e-6)


def test_batches_must_be_whole() -> None:
    with pytest.raises(ConfigError, match=r"batches\.gradient is 10"):
        Arena(job(batches={"gradient": 10}))
    with pytest.raises(ConfigError, match="has no data"):
        Arena(job("hfdist.tasks.functions:Rosenbrock"))


def test_contenders_take_turns_until_the_budget_is_spent() -> None:
    arena = Arena(job())
    budget = Budget(gradients=12.0, seconds=100.0)
    grid = rivals(arena, ["Adam", "L-BFGS"])
    runs = [enter(arena, name, grid[name][0], budget.spent) for name in grid]
    one, other = race(arena, runs, budget)
    assert one.is_interleaved
    assert one.gradients[-1] == one.updates[-1] == 12.0
    assert len(one.losses) == 13
    assert other.gradients[-1] >= 12.0
    assert other.updates[-1] == 10 * (len(other.losses) - 1)
    for curve in (one, other):
        assert curve.losses[-1] < curve.losses[0]
    (again,) = race(arena, [enter(arena, "Adam", grid["Adam"][0], budget.spent)], budget)
    assert again.losses == one.losses


def test_every_rival_trains() -> None:
    arena = Arena(job())
    budget = Budget(gradients=30.0, seconds=100.0)
    grids = rivals(arena)
    assert {"SOAP", "Muon", "Adam", "L-BFGS", "K-FAC", "SGD"} == set(grids)
    for name, settings in grids.items():
        (found,) = race(arena, [enter(arena, name, settings[0], budget.spent)], budget)
        assert found.lowest < 0.999 * found.losses[0], name
        if name == "K-FAC":  # statistics every step: two products of six beside the gradient
            assert found.gradients[1] == pytest.approx(4 / 3)


def test_kfac_is_left_out_where_it_does_not_know_the_layers() -> None:
    assert "K-FAC" not in rivals(Arena(job(LINES)))
    with pytest.raises(ConfigError, match="unknown optimizer 'Adamm'"):
        rivals(Arena(job()), ["Adamm"])


# -- tables ---------------------------------------------------------------------------------------------


def test_first_reaches_and_ratios() -> None:
    mine = curve([9.0, 4.0, 2.0], NAME, "defaults")  # 2 gradients, half a second an update
    slow, fast = curve([9.0, 8.0, 4.0, 2.0]), curve([9.0, 4.0, 4.0, 4.0], setting="lr 2")
    assert mine.first(4.0, "gradients") == 2.0
    assert mine.first(3.0, "seconds") == 1.0
    assert math.isinf(mine.first(1.0, "updates"))
    assert first_places([slow, fast], [4.0, 2.0]) == {"lr 1", "lr 2"}
    table = rows([mine, slow, fast], [4.0, 2.0, 1.0])
    by = {(row["loss"], row["optimizer"]): row for row in table}
    assert by[4.0, "Adam"]["gradients"] == 2.0  # of its better setting
    assert by[4.0, NAME]["gradients_ratio"] == 1.0
    assert by[2.0, "Adam"]["updates"] == 3.0
    assert by[2.0, NAME]["updates_ratio"] == pytest.approx(2 / 3)
    assert by[1.0, NAME]["gradients"] is None
    json.dumps(table, allow_nan=False)


def test_a_seed_that_does_not_reach_a_loss_counts() -> None:
    good, bad = curve([9.0, 1.0]), curve([9.0, 8.0], seed=1)
    assert rows([good, bad], [2.0])[0]["gradients"] is None


def test_defaults_are_put_beside_the_best_of_hessian_frees_own_options() -> None:
    default = curve([9.0, 8.0, 4.0, 2.0], NAME, "defaults")
    other = curve([9.0, 4.0, 4.0, 4.0], BEST, "optim.damping=10")
    first, second, third = own_ratios([other], [default], [4.0, 2.0, 1.0])
    assert (first["of"], first["ratio"]) == ("optim.damping=10", 2.0)
    assert (second["of"], second["ratio"]) == ("defaults", 1.0)
    assert (third["of"], third["ratio"]) == (None, None)
    for changes in GRID:
        assert with_overrides(job(), changes.split()) != job()


def test_thresholds_are_what_the_best_reaches() -> None:
    falling = curve([float(100 - k) for k in range(41)])  # 80 gradients
    diverged = curve([9.0, math.nan])
    assert thresholds_of([falling, diverged], 80.0)[-1] == 9.0
    assert thresholds_of([falling], 80.0) == [90.0, 80.0, 60.0]
    assert diverged.has_diverged


# -- the study ------------------------------------------------------------------------------------------


def test_grids_are_measured_once_and_races_anew(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    said: list[str] = []

    def study(**changes: Any) -> Study:
        said.clear()
        return compare(
            "small",
            job(optim={"cg_max_iter": 3}),
            budget=Budget(gradients=changes.get("gradients", 8.0), seconds=100.0),
            seeds=(0, 1),
            names=["SGD"],
            path=path,
            progress=said.append,
        )

    first = study()
    assert sum("in turns" not in text for text in said) == len(first.grids) == 6
    assert {c.seed for c in first.races} == {0, 1}
    assert {c.optimizer for c in first.races} == {"SGD", NAME}
    assert "cg_max_iter 3" in {c.setting for c in first.races}
    assert Study.load(path).races[0].losses == pytest.approx(first.races[0].losses, rel=1e-5)
    again = study()
    assert all("in turns" in text for text in said)
    assert [c.losses for c in again.grids] == [
        [float(f"{loss:.6g}") for loss in c.losses] for c in first.grids
    ]
    study(gradients=10.0)  # another budget, other curves
    assert sum("in turns" not in text for text in said) == 6


@pytest.mark.timeout(600)  # a bound on hangs: imports and pictures take long on a busy machine
def test_the_command_writes_tables_and_pictures(tmp_path: Path) -> None:
    arguments = ["bench", "optimizers", "diabetes", "task_args.hidden=[4]", "optim.cg_max_iter=3"]
    arguments += ["--gradients", "10", "--seeds", "0", "--rivals", "SGD"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout.splitlines()[-1])
    assert {row["optimizer"] for row in table} == {"SGD", NAME}
    assert (tmp_path / "diabetes.png").stat().st_size > 10_000
    assert Study.load(tmp_path / "diabetes.json").job["task_args"] == {"hidden": [4]}


def test_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown problem 'digit'"):
        named("digit", [])
    name, config, losses = named("digits-autoencoder", ["seed=3"])
    assert (name, config.seed, losses[-1]) == ("digits-autoencoder", 3, 14.9)
    result = CliRunner().invoke(app, ["bench", "optimizers", "list"])
    assert "resnet-18" in result.stdout
    result = CliRunner().invoke(app, ["bench", "optimizers", "diabetes", "--seeds", "a"])
    assert isinstance(result.exception, ConfigError) or result.exit_code == 2


@pytest.mark.parametrize("name", COMPARISONS)
def test_problems_have_models_and_losses(name: str) -> None:
    """On two examples: sizes that a test can afford."""
    known = COMPARISONS[name]
    torch.manual_seed(0)
    small: dict[str, Any] = {"train": 4} if "train" in known.task_args else {}
    task = load_task(known.task, {**known.task_args, **small})
    data = task.train_data()
    examples = [data[k] for k in range(2)]  # type: ignore[index]
    batch = task.collate(examples)
    loss = task.loss(task.forward(task.model(), batch), batch)
    total = loss[0] if isinstance(loss, tuple) else loss
    assert total.isfinite()
    assert total.requires_grad
