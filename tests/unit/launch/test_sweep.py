"""What a sweep tries, before anything runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

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
    ("text", "why"),
    [
        ("uniform(2,1)", "smaller number first"),
        ("loguniform(0,1)", "both above 0"),
        ("randint(1,2.5)", "two whole numbers"),
        ("uniform(a,b)", "two numbers"),
        ("uniform(nan,1)", "finite"),
        ("uniform(1,inf)", "finite"),
    ],
)
def test_a_range_that_is_none_is_told(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.damping=.*{why}"):
        tune.samples({"optim.damping": [text]}, 1, seed=0)


def test_a_sweep_that_would_not_end_is_told() -> None:
    with pytest.raises(ConfigError, match="samples is 10001"):
        tune.samples({"seed": ["1", "2"]}, 10_001, seed=0)
    with pytest.raises(ConfigError, match=r"seed is 4294967296: it must be below"):
        tune.samples({"seed": ["1", "2"]}, 1, seed=2**32)
    with pytest.raises(ConfigError, match="the grid has 1000000 combinations"):
        tune.points({f"task_args.k{k}": list("0123456789") for k in range(6)})


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["seed=1,2", "seed=3"], "seed comes twice"),
        (["seed=3", "seed=1,2"], "seed comes twice"),
        (["seed=uniform(1,2)", "seed=uniform(1,3)"], "seed comes twice"),
        (["output=a,b"], "output cannot be varied"),
        (["tracking.experiment=a,b"], r"tracking\.experiment cannot be varied"),
    ],
)
def test_what_a_sweep_cannot_vary_is_told(words: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        tune.split_grid(words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["folder", "--resume", "--samples", "3", "--eta", "2"], "leave --eta, --samples out"),
        (["job.yaml", "seed=1,2", "--metric", "loss"], "--metric is for --halving"),
        (["job.yaml", "seed=1,2", "--eta", "2"], "--eta is for --halving"),
        (["job.yaml", "seed=1,2", "--seed", "2"], "--seed is for --samples"),
    ],
)
def test_options_without_effect_are_told(
    words: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hfdist.cli import main

    monkeypatch.setattr(sys, "argv", ["hfdist", "sweep", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_run_without_the_metric_that_it_is_compared_by_ends(tmp_path: Path) -> None:
    """Silently, its place among the others would be as good as drawn."""
    from hfdist.launch.ray.trial import TuneTrial

    made = plan(tmp_path, steps=10_000)
    trial: Any = TuneTrial.__new__(TuneTrial)
    trial.setup(
        {"number": 0},
        trials=made.trials,
        metric="eval/nope",
        halving=2,
        parent=None,
        folder=str(made.folder),
        cwd=str(tmp_path / "elsewhere"),
        environment={},
    )
    last = [trial.step() for _ in range(3)][-1]
    while not last["done"]:
        last = trial.step()
    row = tune._row(made.trials[0], made.folder)
    assert row["status"] == "FAILED"
    assert row["error"].startswith("metric is eval/nope: the first 2 steps record ")
    assert "final_loss" in row["error"]
    assert row["steps"] < 10_000


def plan(tmp_path: Path, steps: int = 6) -> tune.Plan:
    from hfdist.config.job import load_config

    (tmp_path / "job.yaml").write_text(JOB)
    fixed = ["task_args={}", f"output={tmp_path}", f"steps={steps}"]
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
