"""What a lost worker costs in time. On a machine with nothing else to do: `make soak`."""

from __future__ import annotations

import json
import random
import signal
import statistics
import time
from pathlib import Path

import psutil
import pytest
from ray_nodes import Nodes, Program, hfdist, nodes, workers_of, write_slow_job

from hfdist import api

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KILLS = 20
LIMIT = 12.0
"""Seconds, in the median, from a worker's death to the end of the next step."""
PRIORITY = {"RAY_worker_niceness": "0"}
"""Ray starts workers behind all else that the machine does."""
PARTS = ("seen", "new group", "task, data, checkpoint", "step")


@pytest.mark.timeout(3000)
def test_a_killed_worker_costs_seconds(tmp_path: Path) -> None:
    """A worker is killed whenever a spare process is ready on each node; the run ends as an undisturbed
    one, and leaves no process."""
    dice, costs = random.Random(1), []
    job, run_dir = write_slow_job(tmp_path), tmp_path / "runs" / "killed"
    with nodes(tmp_path, {"num_cpus": 1}, {"num_cpus": 1}, settings=PRIORITY) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "killed", "steps=100000"),
            *("launch.backend=ray", f"launch.address={cluster.address}"),
            f"launch.max_failures={KILLS}",
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            program.wait_for(lambda p: len(p.events("step")) >= 1, 240)
            for _ in range(KILLS):
                wait_for_spares(cluster, program)
                time.sleep(dice.uniform(0.0, 1.0))
                costs.append(kill_one(dice.choice(workers_of(run_dir)), run_dir, program))
            wait_for_spares(cluster, program)
            left = cluster.spares()
            program.signal(signal.SIGINT)
            assert program.end(120) == 130, program.output
            assert psutil.wait_procs(left, timeout=60)[1] == []
    for part, seconds in zip(PARTS, zip(*costs, strict=True), strict=True):
        print(f"{part:24} {statistics.median(seconds):5.1f} s, at most {max(seconds):5.1f}")
    totals = [sum(cost) for cost in costs]
    print(f"{KILLS} kills: {statistics.median(totals):.1f} s, at most {max(totals):.1f}")
    result = json.loads((run_dir / "result.json").read_text())
    quick = ["task=hfdist.tasks.digits:DigitsClassifier", f"steps={result['steps']}"]
    undisturbed = api.train(job, quick, run_id="undisturbed")
    steps = [json.loads(s)["step"] for s in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert result["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert steps == list(range(result["steps"]))
    assert statistics.median(totals) <= LIMIT


def wait_for_spares(cluster: Nodes, program: Program) -> None:
    """Return once each of the two nodes has a spare process that has imported everything."""
    deadline, before = time.monotonic() + 240.0, -1.0
    while True:
        spares = cluster.spares()
        used = sum(sum(spare.cpu_times()[:2]) for spare in spares)
        if len(spares) == 2 and used - before < 0.3:  # in 2 s: they do nothing any more
            return
        assert time.monotonic() < deadline, program.output
        before = used
        time.sleep(2.0)


def kill_one(worker: psutil.Process, run_dir: Path, program: Program) -> tuple[float, ...]:
    """Kill a worker; returns the seconds of each of `PARTS`."""
    began, starts, groups = time.monotonic(), len(program.events("start")), groups_of(run_dir)
    worker.send_signal(signal.SIGKILL)
    seen = program.wait_for(lambda p: p.output.count("the workers restart") > starts - 1, 60)
    while groups_of(run_dir) == groups:
        assert time.monotonic() - began < 120, program.output
        time.sleep(0.02)
    group = time.monotonic() - began - seen
    start = program.wait_for(lambda p: len(p.events("start")) > starts, 120)
    known = len(program.events("step"))
    step = program.wait_for(lambda p: len(p.events("step")) > known, 60)
    return seen, group, start, step


def groups_of(run_dir: Path) -> int:
    """How many groups of two workers there have been."""
    logs = [run_dir / "logs" / f"rank-{rank}.log" for rank in (0, 1)]
    return min(log.read_text().count("process ") for log in logs)
