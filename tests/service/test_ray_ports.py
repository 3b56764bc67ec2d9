"""What listens where, by the real sockets of a cluster of this machine and of its workers."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
from ray_nodes import hfdist, own_cluster

pytestmark = [pytest.mark.ray]

JOB = """
name: digits
task: slow.py:Slow
steps: 1000
launch: {workers: 2, threads_per_worker: 1, backend: ray}
tracking: {enabled: false}
"""
SLOW_TASK = """
import time
from hfdist.tasks.digits import DigitsClassifier

class Slow(DigitsClassifier):
    def loss(self, *arguments):
        time.sleep(0.05)
        return super().loss(*arguments)
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    (tmp_path / "slow.py").write_text(SLOW_TASK)
    return path


def listening(roots: Iterable[psutil.Process]) -> dict[str, list[str]]:
    """Addresses at which each program of these families listens."""
    found: dict[str, list[str]] = {}
    for root in roots:
        for process in (root, *root.children(recursive=True)):
            try:
                sockets = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
                name = " ".join(process.cmdline())[-80:]
            except psutil.Error:
                continue  # it has just ended
            for each in sockets:
                found.setdefault(name, []).append(f"{each.laddr.ip} {each.laddr.port}")
    return found


def open_to_others(sockets: dict[str, list[str]]) -> dict[str, list[str]]:
    def is_open(address: str) -> bool:
        ip = ipaddress.ip_address(address.split()[0])
        return not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback

    opened = {name: [a for a in each if is_open(a)] for name, each in sockets.items()}
    return {name: each for name, each in opened.items() if each}


@pytest.mark.timeout(600)
def test_a_cluster_of_this_machine_is_closed_to_others(tmp_path: Path, job: Path) -> None:
    """Two nodes, a submitted job's ports and a run's workers included."""
    (tmp_path / "home").mkdir()
    with own_cluster(tmp_path / "home") as cluster:
        cluster.start_head(cpus=1)
        cluster.join(1)
        at = ("--address", cluster.dashboard)
        submitted = cluster("submit", str(job), "--run-id", "open", *at)
        assert submitted.returncode == 0, submitted.stderr
        record = tmp_path / "runs" / "open" / "metrics.jsonl"
        for _ in range(90):
            if record.exists() and record.read_text():
                break
            assert (
                json.loads(cluster("jobs", "status", "open", "--json", *at).stdout)["ended"] is None
            )
        sockets = listening(cluster.nodes())
        assert len(sockets) > 6
        assert open_to_others(sockets) == {}
        # Nor is there Ray's server for clients, whose port is one for all clusters of a machine.
        assert not [a for each in sockets.values() for a in each if a.endswith(" 10001")]
        stopped = cluster("jobs", "stop", "open", *at)
        assert stopped.returncode == 0, stopped.stderr


@pytest.mark.timeout(600)
def test_a_private_cluster_is_closed_to_others(tmp_path: Path, job: Path) -> None:
    arguments = ["train", str(job), "--json", "--run-id", "private"]
    with hfdist(*arguments, environment={"OMP_NUM_THREADS": "1"}, cwd=tmp_path) as program:
        program.wait_for(lambda p: len(p.events("step")) >= 1, 120)
        sockets = listening([psutil.Process(program.process.pid)])
        assert len(sockets) > 3
        assert open_to_others(sockets) == {}
