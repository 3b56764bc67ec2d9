"""A grid through Ray Tune."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray_nodes import ROOT, hfdist

JOB = """
name: grid
task: hfdist.tasks.digits:DigitsClassifier
steps: 2
tracking: {system_metrics: false, log_model: false}
"""


@pytest.mark.ray
@pytest.mark.smoke
@pytest.mark.timeout(1200)
def test_a_grid_is_nested_in_one_run(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    # The second point fails when it runs: the others go on.
    values = "batches.gradient=64,99999"
    answer = subprocess.run(
        [sys.executable, "-m", "hfdist", "sweep", "job.yaml", values, "steps=1"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "FINISHED" in answer.stdout
    assert "FAILED" in answer.stdout
    (table,) = (tmp_path / "runs").glob("*/sweep.json")
    good, bad = json.loads(table.read_text())["runs"]
    assert good["values"] == {"batches.gradient": "64"}
    assert good["steps"] == 1
    assert "batches.gradient is 99999" in bad["error"]
    assert f"best: {good['run_dir']}" in answer.stdout

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "hfdist"]
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = found.pop(table.parent.name)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["batches.gradient"] == "64, 99999"
    assert [run.info.run_name for run in found.values()] == [good["run_id"]]
    assert found[good["run_id"]].data.tags["mlflow.parentRunId"] == parent.info.run_id


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_random_points_are_halved_and_the_sweep_goes_on_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: random\ntask: hfdist.tasks.functions:Rosenbrock\nsteps: 6\n"
        "checkpoint: {every: 1, asynchronous: false}\ntracking: {enabled: false}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [
        *("sweep", "job.yaml", "optim.damping=loguniform(1e-3,1e3)", "optim.cg_max_iter=1,2"),
        *("--samples", "4", "--halving", "2", "--eta", "2", "--metric", "final_loss"),
    ]
    with hfdist(*words, environment=environment, cwd=tmp_path) as program:
        program.wait_for(lambda p: "FINISHED" in p.output or "STOPPED" in p.output, 200)
        program.signal(signal.SIGKILL)
        program.end(30)
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/plan.json"))
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["runs"]) == 4
    dampings = [float(point["optim.damping"]) for point in plan["runs"].values()]
    assert len(set(dampings)) == 4
    assert all(1e-3 <= damping <= 1e3 for damping in dampings)
    before = {path: path.read_text() for path in (tmp_path / "runs").glob("*/result.json")}
    assert before
    answer = subprocess.run(
        [sys.executable, "-m", "hfdist", "sweep", str(folder), "--resume", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    rows = json.loads(answer.stdout)
    assert [row["run_id"] for row in rows] == list(plan["runs"])
    assert {row["status"] for row in rows} <= {"FINISHED", "STOPPED"}
    assert all(row["steps"] == 6 for row in rows if row["status"] == "FINISHED")
    for path, text in before.items():  # what had ended is not trained again
        assert json.loads(text)["status"] != "FINISHED" or path.read_text() == text
