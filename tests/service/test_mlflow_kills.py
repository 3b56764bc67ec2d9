"""After kills MLflow and metrics.jsonl hold the same numbers: a real server, real processes, SIGKILL."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

pytestmark = [pytest.mark.timeout(600)]

TASK = """
import os, time
from hfdist.tasks.digits import DigitsClassifier

class Slow(DigitsClassifier):
    def loss(self, *arguments):
        time.sleep(0.03)
        return super().loss(*arguments)

class Varying(Slow):
    '''Another process has other results, as on other hardware.'''

    def loss(self, *arguments):
        return super().loss(*arguments) * (1 + 1e-3 * (os.getpid() % 1000 + 1))
"""

JOB = """
name: kills
task: {folder}/task.py:{task}
steps: 12
batches: {{gradient: 64}}
optim: {{cg_max_iter: 3}}
checkpoint: {{every: 4, asynchronous: false}}
tracking: {{uri: "{uri}", experiment: kills, system_metrics: false, log_model: false}}
output: {folder}/runs
"""


def write_job(folder: Path, task: str, uri: str) -> Path:
    (folder / "task.py").write_text(TASK)
    job = folder / "job.yaml"
    job.write_text(JOB.format(folder=folder, task=task, uri=uri))
    return job


def hfdist(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hfdist", *map(str, arguments), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def runs(client: MlflowClient, run_id: str) -> list[Any]:
    experiment = client.get_experiment_by_name("kills")
    if experiment is None:
        return []
    return client.search_runs([experiment.experiment_id], f"tags.`hfdist.run_id` = '{run_id}'")


def kill_after(process: subprocess.Popen[str], client: MlflowClient, run_id: str, step: int) -> str:
    """SIGKILL the process and its workers once the server has a step; returns the MLflow run."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        for run in runs(client, run_id):
            told = client.get_metric_history(run.info.run_id, "loss")
            if max((metric.step for metric in told), default=-1) >= step:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate(timeout=120)
                return run.info.run_id
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(process.communicate(timeout=120)[0])


def assert_agree(client: MlflowClient, run_dir: Path, mlflow_run_id: str) -> None:
    """Every number of every step, as often, in both records."""
    expected: dict[tuple[str, int], list[float]] = {}
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for key, value in line.items():
            if key not in ("step", "time") and isinstance(value, (int, float)):
                expected.setdefault((key, line["step"]), []).append(float(value))
    found: dict[tuple[str, int], list[float]] = {}
    for key in client.get_run(mlflow_run_id).data.metrics:
        for metric in client.get_metric_history(mlflow_run_id, key):
            found.setdefault((key, metric.step), []).append(metric.value)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == values or (math.isnan(values[0]) and math.isnan(found[key][0])), key
    assert {step for _, step in expected} == set(range(12))


@pytest.mark.parametrize(
    ("task", "fate"),
    [
        ("Slow", "the spool stays"),
        pytest.param("Varying", "the spool stays", marks=pytest.mark.slow),
        pytest.param("Slow", "the spool is lost", marks=pytest.mark.slow),
    ],
)
def test_the_two_records_agree_after_kills(server, tmp_path, task, fate):
    client = MlflowClient(server.uri)
    run_id = f"{task}-{len(fate)}"
    job, run_dir = write_job(tmp_path, task, server.uri), tmp_path / "runs" / run_id
    first = kill_after(hfdist("train", job, "--run-id", run_id), client, run_id, 6)
    client.set_tag(first, "asked by", "ann")
    if fate == "the spool is lost":  # with its machine
        shutil.rmtree(run_dir / "spool")
    kill_after(hfdist("resume", run_dir), client, run_id, 10)
    if fate == "the spool is lost":
        shutil.rmtree(run_dir / "spool")
    last = hfdist("resume", run_dir)
    output, _ = last.communicate(timeout=240)
    assert last.returncode == 0, output
    [run] = runs(client, run_id)  # one job, one run
    assert_agree(client, run_dir, run.info.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["asked by"] == "ann"
    assert json.loads((run_dir / "result.json").read_text())["mlflow_run_id"] == run.info.run_id
    if (task, fate) == ("Slow", "the spool stays"):  # nothing but times differed
        assert run.info.run_id == first
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    walls = [json.loads(line)["wall_seconds"] for line in lines]
    assert walls == sorted(walls)


@pytest.mark.slow
def test_a_run_that_stops_before_it_has_come_as_far_again(server, tmp_path):
    client = MlflowClient(server.uri)
    job, run_dir = write_job(tmp_path, "Slow", server.uri), tmp_path / "runs" / "short"
    job.write_text(job.read_text().replace("steps: 12", "steps: 40"))
    kill_after(hfdist("train", job, "--run-id", "short", "checkpoint.every=5"), client, "short", 17)
    for folder in (run_dir / "checkpoints").iterdir():
        if int(folder.name.rpartition("-")[2]) > 10:
            shutil.rmtree(folder)  # it goes on far behind, also where it was killed late
    last = hfdist("resume", run_dir, "steps=12")
    output, _ = last.communicate(timeout=240)
    assert last.returncode == 0, output
    [run] = runs(client, "short")
    assert_agree(client, run_dir, run.info.run_id)
