"""Long proofs on a real MLflow server: minutes without it lose nothing and cost no time."""

from __future__ import annotations

import json
import signal
import statistics
import time
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray_nodes import hfdist
from server import MlflowServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JOB = """
name: digits
task: slow.py:Slow
steps: 100000
optim: {cg_max_iter: 10, damping: 1.0, adapt_damping: false}
checkpoint: {every: 100000}
launch: {threads_per_worker: 1}
"""
TASK = """
import time
from hfdist.tasks.digits import DigitsClassifier

class Slow(DigitsClassifier):
    def loss(self, *arguments):
        time.sleep(0.02)
        return super().loss(*arguments)
"""
OUTAGE = 120.0


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_two_minutes_without_the_server(tmp_path: Path, how: str) -> None:
    """The server is away in mid-run: all metrics arrive, with their times, and steps take as long."""
    (tmp_path / "job.yaml").write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    (tmp_path / "slow.py").write_text(TASK)
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    server.start()
    run_dir = tmp_path / "runs" / "outage"
    arguments = ["train", "job.yaml", "--json", "--run-id", "outage", f"tracking.uri={server.uri}"]
    try:
        with hfdist(*arguments, environment={}, cwd=tmp_path) as program:
            program.wait_for(lambda p: len(p.events("step")) >= 5, 90)
            time.sleep(30.0)
            away = time.time()
            server.kill() if how == "killed" else server.pause()
            time.sleep(OUTAGE)
            back = time.time()
            server.start() if how == "killed" else server.go_on()
            time.sleep(30.0)
            program.signal(signal.SIGINT)
            assert program.end(120) == 130, program.output
        records = [
            json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        ]
        result = json.loads((run_dir / "result.json").read_text())
        client = MlflowClient(server.uri)
        history = client.get_metric_history(result["mlflow_run_id"], "loss")
        assert client.get_run(result["mlflow_run_id"]).info.status == "KILLED"
    finally:
        server.kill()
    assert sorted(m.step for m in history) == [r["step"] for r in records]
    told = {m.step: m.timestamp / 1000 for m in history}
    assert all(abs(told[r["step"]] - r["time"]) < 0.5 for r in records)
    seconds = [(b["time"], b["time"] - a["time"]) for a, b in pairwise(records)]
    during = statistics.median(s for at, s in seconds if away < at < back)
    before_and_after = statistics.median(s for at, s in seconds[3:] if not away < at < back)
    print(
        f"{how}: {len(records)} steps, none lost; a step {1e3 * before_and_after:.1f} ms, "
        f"{1e3 * during:.1f} ms without the server"
    )
    assert during < 1.05 * before_and_after + 0.005
