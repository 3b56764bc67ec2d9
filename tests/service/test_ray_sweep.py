"""A grid through Ray Tune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_nodes import ROOT

JOB = """
name: grid
task: hfdist.tasks.digits:DigitsClassifier
steps: 2
tracking: {system_metrics: false, log_model: false}
"""


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_grid_is_nested_in_one_run(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    # The second point fails when it runs: the others go on.
    values = "batches.gradient=64,99999"
    answer = subprocess.run(
        [sys.executable, "-m", "hfdist", "sweep", "job.yaml", values, "steps=1"],
        capture_output=True,
        text=True,
        timeout=150,
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
