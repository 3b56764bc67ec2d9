"""Errors of optimizers on differential equations: same points for all, errors off the clock, tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hfdist.bench.optimizers.arena import Arena, Budget, race
from hfdist.bench.optimizers.hessian_free import NAME, hessian_free
from hfdist.bench.optimizers.rivals import enter, rivals
from hfdist.bench.pinns import PROBLEMS, Study, markdown, named, plot, rows
from hfdist.bench.pinns.rivals import ADAM_PART, grids
from hfdist.bench.pinns.trace import MARKS, Trace, Watch
from hfdist.cli.app import app
from hfdist.config.job import RunConfig, from_dict
from hfdist.errors import ConfigError
from hfdist.tasks.equations import Poisson

JOBS = Path(__file__).resolve().parents[3] / "deploy" / "jobs"
SMALL = {"widths": [6], "interior": 30, "conditions": 16, "evaluation": 50}


def job(**values: Any) -> RunConfig:
    task_args = {**SMALL, **values.pop("task_args", {})}
    task = values.pop("task", "hfdist.tasks.equations:Poisson")
    return from_dict({"task": task, "task_args": task_args, "dtype": "float64", **values})


def test_problems_are_those_of_the_jobs() -> None:
    for name in PROBLEMS:
        _, config = named(name, [])
        known = yaml.safe_load((JOBS / f"{name.replace('-', '_')}.yaml").read_text())
        for key in ("task", "dtype"):
            assert getattr(config, key) == known[key], name
        assert config.task_args == known.get("task_args", {}), name


# -- points ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_step", [False, True])
def test_all_see_the_points_of_a_job_s_steps(every_step: bool) -> None:
    """The loss at the start of each of three steps of Hessian-free is the arena's, of the same parameters."""
    config = job(task_args={"every_step": every_step})
    arena, run = Arena(config), hessian_free(config)
    for step in range(3):
        arena.begin(step)
        before = arena.loss(run.model)
        assert next(run.updates).loss == pytest.approx(before, rel=1e-12)


def test_rivals_begin_every_update_on_its_points() -> None:
    arena = Arena(job(task_args={"every_step": True}))
    (setting, *_) = rivals(arena, ["Adam"], grids())["Adam"]
    run = enter(arena, "Adam", setting, lambda curve: 0.5)
    seen = []
    for _ in range(3):
        next(run.updates)
        seen.append(arena.batches[0][1])
    assert not torch.equal(seen[0], seen[1])
    again = Arena(job(task_args={"every_step": True}))
    again.begin(2)
    assert torch.equal(again.batches[0][1], seen[2])


# -- rivals ----------------------------------------------------------------------------------------------


def test_every_rival_lowers_the_loss() -> None:
    arena = Arena(job())
    budget = Budget(gradients=60.0, seconds=100.0)
    found = rivals(arena, None, grids())
    assert {"Adam", "L-BFGS", "Adam, then L-BFGS"} <= set(found)
    for name, grid in found.items():
        (curve,) = race(arena, [enter(arena, name, grid[-1], budget.spent)], budget)
        assert curve.lowest < curve.losses[0], name


def test_lbfgs_takes_over_after_its_part() -> None:
    arena = Arena(job())
    budget = Budget(gradients=80.0, seconds=100.0)
    (setting, *_) = rivals(arena, ["Adam, then L-BFGS"], grids())["Adam, then L-BFGS"]
    (curve,) = race(arena, [enter(arena, "both", setting, budget.spent)], budget)
    numbers = [b - a for a, b in zip(curve.updates, curve.updates[1:])]
    adam = round(ADAM_PART * 80)
    assert numbers[:adam] == [1] * adam
    assert set(numbers[adam:]) == {10}


# -- errors ----------------------------------------------------------------------------------------------


def test_errors_are_those_of_the_model_and_off_the_clock() -> None:
    config = job()
    arena = Arena(config)
    watch = Watch(arena.task, config, seconds=0.4)
    run = hessian_free(config)
    race(arena, [run], Budget(gradients=math.inf, seconds=0.4), watch)
    trace = watch.finish(run)
    x = arena.task.evaluation_points()  # type: ignore[attr-defined]
    exact = arena.task.solution(x)  # type: ignore[attr-defined]
    error = (run.model(x)[:, 0].detach() - exact).norm() / exact.norm()
    assert trace.error == pytest.approx(float(error), rel=1e-12)
    assert trace.seconds == sorted(set(trace.seconds))
    assert trace.seconds[-1] == run.curve.seconds[-1]
    assert 1 <= len(trace.seconds) <= MARKS + 1
    assert trace.updates == run.curve.updates[-1]


def test_a_model_of_no_numbers_has_an_infinite_error() -> None:
    config = job()
    arena = Arena(config)
    watch, run = Watch(arena.task, config, seconds=1.0), hessian_free(config)
    next(run.updates)
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.nan)
    run.curve.losses.append(math.nan)
    assert math.isinf(watch.finish(run).error)


class NoSolution(Poisson):
    def evaluation_points(self) -> None:  # type: ignore[override]
        return None


def test_a_task_without_a_solution_is_refused() -> None:
    with pytest.raises(ConfigError, match="define solution"):
        Watch(NoSolution(), job(), 1.0)
    table = from_dict({"task": "hfdist.tasks.small_net:SmallNet", "task_args": {"examples": 20}})
    watch, run = Watch(Arena(table).task, table, 1.0), hessian_free(table)
    with pytest.raises(ConfigError, match="has no metric 'relative_error'"):
        watch.finish(run)


# -- tables ----------------------------------------------------------------------------------------------


def trace(name: str, seed: int, errors: list[float]) -> Trace:
    seconds = [float(k + 1) for k in range(len(errors))]
    return Trace(
        optimizer=name, setting="s", seed=seed, updates=7, seconds=seconds, errors=errors, loss=0.0
    )


def study(races: list[Trace]) -> Study:
    return Study(problem="poisson2d", job={}, seconds=4.0, clock="cpu", threads=1, races=races)


def test_rows_are_medians_over_seeds_and_the_best_comes_first() -> None:
    mine = [trace(NAME, k, [1.0, 0.1, 0.01, 1e-3 * (k + 1)]) for k in range(3)]
    other = [trace("Adam", k, [0.5, 0.4, 0.3, 0.1]) for k in range(3)]
    lost = [trace("SOAP", 0, [0.5, math.inf, math.inf, math.inf])]
    first, second, third = rows(study([*other, *mine, *lost]))
    assert (first["optimizer"], first["error"], first["worst"]) == (NAME, 2e-3, 3e-3)
    assert (first["error_quarter"], first["error_half"]) == (1.0, 0.1)
    assert first["seconds_to_best_rival"] == 2.0  # until 0.1
    assert second["optimizer"] == "Adam"
    assert third["error"] is None
    json.dumps([first, second, third], allow_nan=False)
    text = markdown([study([*mine, *other, *lost])], {"poisson2d": "Poisson"})
    assert (
        "| Poisson | 4 CPU s | 3 | **2.0e-3** (3.0e-3) | 1.0e-1 (1.0e-1) | diverged (diverged) | 2.0 CPU s |"
        in text
    )


def test_pictures_of_several_problems(tmp_path: Path) -> None:
    one = study([trace(NAME, 0, [1.0, 0.1]), trace("Adam", 0, [1.0, math.inf])])
    assert plot([one] * 4, tmp_path / "all.png").stat().st_size > 10_000


# -- the command -----------------------------------------------------------------------------------------


@pytest.mark.timeout(600)  # a bound on hangs: imports and pictures take long on a busy machine
def test_the_command_measures_grids_once_and_shows(tmp_path: Path) -> None:
    changes = [f"task_args.{key}={value}".replace(" ", "") for key, value in SMALL.items()]
    arguments = ["bench", "pinns", "heat1d", *changes, "--output", str(tmp_path), "--json"]
    measured = ["--seconds", "0.2", "--seeds", "0", "--clock", "cpu", "--rivals", "L-BFGS"]
    result = CliRunner().invoke(app, [*arguments, *measured])
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout.splitlines()[-1])
    assert {row["optimizer"] for row in table} == {NAME, "L-BFGS"}
    known = Study.load(tmp_path / "heat1d.json")
    assert [t.setting for t in known.grids] == ["history 10", "history 100"]
    assert (tmp_path / "pinns.png").stat().st_size > 10_000
    assert "heat on an interval" in (tmp_path / "pinns.md").read_text()

    again = CliRunner().invoke(app, [*arguments, *measured])
    assert all("in turns" in line for line in again.stderr.splitlines() if "seed" in line)
    assert Study.load(tmp_path / "heat1d.json").grids == known.grids

    shown = CliRunner().invoke(app, [*arguments, "--show"])
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == ""


def test_what_the_command_refuses(tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        return str(CliRunner().invoke(app, ["bench", "pinns", *arguments]).exception)

    assert "unknown problem 'poison'" in error("poison")
    assert "unknown optimizer 'Adamm'" in error("heat1d", "--rivals", "Adamm")
    assert "clock is 'sun'" in error("heat1d", "--clock", "sun")
    assert "name its folder" in error("--show")
    assert "measure them first" in error("--show", "--output", str(tmp_path))
    assert "poisson5d" in CliRunner().invoke(app, ["bench", "pinns", "list"]).stdout
