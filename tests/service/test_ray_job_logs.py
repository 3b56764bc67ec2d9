"""What `hfdist jobs logs` shows of a job that loses a node and a worker."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_nodes import own_cluster, workers_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TASK = """
import time
from hfdist.tasks.digits import DigitsClassifier

class Slow(DigitsClassifier):
    def loss(self, *arguments):
        time.sleep(0.1)
        return super().loss(*arguments)
"""
JOB = """
name: digits
task: slow.py:Slow
steps: 1000
launch: {{workers: [1, 2], threads_per_worker: 1, max_failures: 5}}
checkpoint: {{every: 1}}
tracking: {{enabled: false}}
output: {folder}/runs
"""


def wait_for(condition: Callable[[], bool], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.mark.timeout(700)
def test_losses_are_told_once_with_rank_node_and_how(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(TASK)
    (tmp_path / "job.yaml").write_text(JOB.format(folder=tmp_path))
    (tmp_path / "home").mkdir()
    run_dir = tmp_path / "runs" / "night"
    record = run_dir / "metrics.jsonl"

    def steps() -> int:
        return len(record.read_text().splitlines()) if record.exists() else 0

    with own_cluster(tmp_path / "home") as cluster:
        cluster.start_head(cpus=1)
        cluster.join(1)
        at = ("--address", cluster.dashboard)
        submitted = cluster("submit", str(tmp_path / "job.yaml"), "--run-id", "night", *at)
        assert submitted.returncode == 0, submitted.stderr
        wait_for(lambda: steps() >= 3)
        cluster.kill(1)
        known = steps()
        wait_for(lambda: steps() > known + 2)
        (worker, *_) = workers_of(run_dir)
        worker.kill()
        known = steps()
        wait_for(lambda: steps() > known + 2)
        stopped = cluster("jobs", "stop", "night", *at)
        assert stopped.returncode == 0, stopped.stderr
        logs = cluster("jobs", "logs", "night", *at).stdout
    print(logs)
    assert "\x1b" not in logs
    assert "state-dump" not in logs
    assert "raylet" not in logs.lower()
    assert "1 of 1 CPU free" not in logs
    restarts = re.findall(
        r"^rank .*: the workers restart from the newest checkpoint.*$", logs, re.M
    )
    assert len(restarts) == 2, logs
    for number, line in enumerate(restarts, 1):
        assert re.match(r"rank [01] on \S+ \(127\.0\.0\.1, process \d+\) ", line), line
        assert f"(failure {number} of 5 allowed)" in line
    assert re.search(r"its node|SIGKILL", restarts[0])
    assert f"process {worker.pid})" in restarts[1]
    assert re.search(r"SIGKILL|does not answer", restarts[1])
