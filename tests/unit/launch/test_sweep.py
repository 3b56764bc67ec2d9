"""What a sweep tries, before anything runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hfdist.errors import ConfigError
from hfdist.launch.ray import tune

JOB = "task: hfdist.tasks.functions:Rosenbrock\nsteps: 6\n"


def test_random_points_are_those_of_the_seed() -> None:
    space = {
        "optim.damping": ["loguniform(1e-3, 10)"],
        "seed": ["randint(1,5)"],
        "optim.cg_tol": ["uniform(0.1,0.2)"],
        "optim.curvature_opt": ["ggn", "hessian"],
    }
    found = tune.samples(space, 200, seed=3)
    assert found == tune.samples(space, 200, seed=3)
    assert found[:5] != tune.samples(space, 5, seed=4)
    dampings = [float(point["optim.damping"]) for point in found]
    assert 1e-3 <= min(dampings) < 0.01
    assert 1 < max(dampings) <= 10
    assert abs(sum(map(math.log10, dampings)) / 200 + 1) < 0.3  # evenly on the logarithm
    assert {point["seed"] for point in found} == {"1", "2", "3", "4"}
    assert all(0.1 <= float(point["optim.cg_tol"]) <= 0.2 for point in found)
    assert {point["optim.curvature_opt"] for point in found} == {"ggn", "hessian"}


@pytest.mark.parametrize(
    "text", ["uniform(2,1)", "loguniform(0,1)", "randint(1,2.5)", "uniform(a,b)"]
)
def test_a_range_that_is_none_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"optim\.damping"):
        tune.samples({"optim.damping": [text]}, 1, seed=0)


def plan(tmp_path: Path, **more: object) -> tune.Plan:
    from hfdist.config.job import load_config

    (tmp_path / "job.yaml").write_text(JOB)
    fixed = ["task_args={}", f"output={tmp_path}"]
    trials = [
        tune.Trial(
            run_id=f"s-{k}",
            values={"optim.damping": value},
            config=load_config(tmp_path / "job.yaml", [*fixed, f"optim.damping={value}"]),
        )
        for k, value in enumerate(("0.1", "1"))
    ]
    config = load_config(tmp_path / "job.yaml", fixed)
    made = tune.Plan(sweep_id="s", config=config, trials=trials, halving=2, eta=4, metric="loss")
    tune.save(made, tmp_path / "job.yaml", fixed)
    return made


def test_a_sweep_is_written_down_and_read_back(tmp_path: Path) -> None:
    made = plan(tmp_path)
    again = tune.load(tmp_path / "s", ["steps=9"])
    assert (again.halving, again.eta, again.metric) == (2, 4, "loss")
    assert [t.run_id for t in again.trials] == ["s-0", "s-1"]
    assert [t.config.optim.damping for t in again.trials] == [0.1, 1.0]
    assert {t.config.steps for t in again.trials} == {9}
    assert again.folder == made.folder
    with pytest.raises(ConfigError, match=r"plan\.json"):
        tune.load(tmp_path)


def test_runs_that_halving_stopped_are_not_those_that_a_person_did(tmp_path: Path) -> None:
    made = plan(tmp_path)
    trial = made.trials[0]
    assert trial.status(made.folder) == "PENDING"
    trial.run_dir.mkdir()
    (trial.run_dir / "result.json").write_text('{"status": "KILLED", "steps": 2}')
    assert trial.status(made.folder) == "KILLED"
    (made.folder / "s-0.stopped").touch()
    assert trial.status(made.folder) == "STOPPED"
