"""What the ways through Ray cost in time. On a machine with nothing else to do: `make soak`."""

from __future__ import annotations

import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import pytest
from ray_nodes import own_cluster

from hfdist import api

pytestmark = [pytest.mark.ray, pytest.mark.slow]

JOB = """
name: digits
task: hfdist.tasks.digits:DigitsAutoencoder
launch: {workers: 2, threads_per_worker: 1, timeout_seconds: 30}
checkpoint: {every: 1000}
tracking: {system_metrics: false, log_model: false}
"""
FIRST_STEP = 40.0  # seconds from the submission
OVERHEAD = 0.03  # of a step's time


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    return path


def times_of(run_dir: Path) -> list[float]:
    """When each step ended."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["time"] for line in lines]


@pytest.mark.timeout(900)
def test_from_a_submission_to_the_first_step(tmp_path: Path, job: Path) -> None:
    seconds = []
    (tmp_path / "home").mkdir()
    with own_cluster(tmp_path / "home") as cluster:
        cluster.start_head(cpus=1)
        cluster.join(1)
        at = ("--address", cluster.dashboard)
        for number in range(4):
            run_id = f"run-{number}"
            began = time.time()
            submitted = cluster("submit", str(job), "--run-id", run_id, "steps=1000", *at)
            assert submitted.returncode == 0, submitted.stderr
            while not times_of(tmp_path / "runs" / run_id):
                assert time.time() - began < 150, cluster("jobs", "logs", run_id, *at).stdout
                time.sleep(0.1)
            seconds.append(times_of(tmp_path / "runs" / run_id)[0] - began)
            stopped = cluster("jobs", "stop", run_id, *at)
            assert stopped.returncode == 0, stopped.stderr
    told = ", ".join(f"{s:.1f}" for s in seconds)
    print(f"from submission to the end of the first step: {told} s")
    assert statistics.median(seconds) < FIRST_STEP


@pytest.mark.timeout(900)
def test_a_step_takes_as_long_as_without_ray(tmp_path: Path, job: Path) -> None:
    """The same run of two workers here and through Ray, in turn; each turn's medians are compared."""
    ratios, medians = [], []
    for turn in range(5):
        both = []
        for backend in ("local", "ray") if turn % 2 else ("ray", "local"):
            run_id = f"{backend}-{turn}"
            api.train(job, ["steps=14", f"launch.backend={backend}"], run_id=run_id)
            ends = times_of(tmp_path / "runs" / run_id)
            # The first steps are a cold start.
            both.append((backend, statistics.median(b - a for a, b in pairwise(ends[2:]))))
        here, there = dict(both)["local"], dict(both)["ray"]
        ratios.append(there / here - 1)
        medians.append((here, there))
    told = ", ".join(f"{1e3 * here:.0f}/{1e3 * there:.0f}" for here, there in medians)
    print(f"a step here/through Ray in ms: {told}; more by {statistics.median(ratios):+.1%}")
    assert statistics.median(ratios) < OVERHEAD
