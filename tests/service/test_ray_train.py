"""Runs on real Ray nodes: the same numbers as elsewhere, and errors in the words of who made them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import Nodes, hfdist, nodes, workers_of

from hfdist import api
from hfdist.errors import ConfigError, DataError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]  # beside other tests

JOB = """
name: digits
task: hfdist.tasks.digits:DigitsClassifier
steps: 4
launch: {workers: 2, threads_per_worker: 1, timeout_seconds: 60}
checkpoint: {every: 1}
tracking: {system_metrics: false, log_model: false}
"""

SLOW_TASK = """
import time
from hfdist.tasks.digits import DigitsClassifier

class Slow(DigitsClassifier):
    def loss(self, *arguments):
        time.sleep(0.02)
        return super().loss(*arguments)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with nodes(tmp_path_factory.mktemp("ray"), {"num_cpus": 1}, {"num_cpus": 1}) as made:
        yield made


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    (tmp_path / "slow.py").write_text(SLOW_TASK)
    return path


def on(cluster: Nodes, *overrides: str) -> list[str]:
    return ["launch.backend=ray", f"launch.address={cluster.address}", *overrides]


def steps_of(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_the_same_run_as_on_this_machine(cluster: Nodes, job: Path) -> None:
    there = api.train(job, on(cluster), run_id="ray")
    here = api.train(job, run_id="local")
    assert there["status"] == "FINISHED"
    assert there["parameters_sha256"] == here["parameters_sha256"]
    assert there["world_size"] == 2
    run_dir = Path(there["run_dir"])
    assert json.loads((run_dir / "result.json").read_text()) == there
    assert steps_of(run_dir) == [0, 1, 2, 3]
    for rank in (0, 1):
        assert f"[rank {rank}]" in (run_dir / "logs" / f"rank-{rank}.log").read_text()
    assert not (run_dir / "ray").exists()  # there is no second kind of checkpoint


def test_a_mistake_is_not_tried_again(cluster: Nodes, job: Path) -> None:
    overrides = on(cluster, "launch.max_failures=3", "batches.gradient=99999")
    with pytest.raises(DataError, match=r"batches\.gradient is 99999"):
        api.train(job, overrides, run_id="mistake")
    assert not (job.parent / "runs" / "mistake").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launch.workers=3", r"3 workers need 3 CPU \(1 each\), the cluster's 2 nodes have 2"),
        ("launch.resources={tpu: 1}", r"need 2 tpu \(1 each\), the cluster's 2 nodes have 0"),
        ("launch.gpus_per_worker=0.5", r"need 1 GPU \(0\.5 each\), .* have 0"),
        ("launch.placement=STRICT_PACK", r"2 workers need one node with 1 CPU each"),
    ],
)
def test_what_cannot_be_placed_says_why(
    cluster: Nodes, job: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        api.train(job, on(cluster, override), run_id="unplaceable")


def test_no_cluster_at_the_address(job: Path) -> None:
    overrides = ["launch.backend=ray", "launch.address=127.0.0.1:1"]
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        api.train(job, overrides)


@pytest.mark.smoke
def test_a_killed_worker_and_a_stop_leave_the_same_trajectory(cluster: Nodes, job: Path) -> None:
    """One worker dies by SIGKILL, then the run is stopped by Ctrl-C and resumed: same parameters."""
    cwd, run_dir = job.parent, job.parent / "runs" / "killed"
    settings = ["task=slow.py:Slow", "steps=12"]
    more = on(cluster, *settings, "launch.max_failures=1")
    arguments = ["train", str(job), "--json", "--run-id", "killed", *more]
    with hfdist(*arguments, environment=cluster.environment, cwd=cwd) as program:
        program.wait_for(lambda p: len(p.events("step")) >= 2, 240)
        workers_of(run_dir)[1].kill()
        program.wait_for(lambda p: len(p.events("start")) == 2, 240)
        program.wait_for(lambda p: p.events("step")[-1]["step"] >= 5, 120)
        program.signal(signal.SIGINT)
        assert program.end(120) == 130, program.output
    stopped: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    assert stopped["status"] == "KILLED"
    assert 6 <= stopped["steps"] < 12
    resumed = api.resume(run_dir, ["launch.backend=local"])
    here = api.train(job, settings, run_id="undisturbed")
    assert resumed["status"] == "FINISHED"
    assert resumed["parameters_sha256"] == here["parameters_sha256"]
    assert steps_of(run_dir) == list(range(12))
