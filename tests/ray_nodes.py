"""Real Ray nodes on this machine, and `hfdist` as a process beside them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
STORE = 80 * 1024 * 1024  # bytes of object store a node
FAST_DETECTION = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
}


class Nodes:
    """Nodes of one cluster, each a raylet with its workers."""

    def __init__(self, environment: dict[str, str]) -> None:
        from ray.cluster_utils import Cluster

        self.environment = environment
        self._cluster = Cluster(initialize_head=False)
        self.members: list[Any] = []

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self, **resources: Any) -> Any:
        """Add a node; the first is the head."""
        node = self._cluster.add_node(
            object_store_memory=STORE, include_dashboard=False, **resources
        )
        self.members.append(node)
        return node

    def kill(self, node: Any) -> None:
        """End a node as a power cut does: its raylet and all workers by SIGKILL."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        family = [*raylet.children(recursive=True), raylet]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        self.members.remove(node)

    def shut_down(self) -> None:
        for node in reversed(self.members):
            with contextlib.suppress(Exception):
                self._cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def nodes(folder: Path, *resources: dict[str, Any]) -> Iterator[Nodes]:
    """A cluster with one node for each of `resources`, with token authentication."""
    from hfdist.launch.ray_cluster import _read_authentication_again, write_token

    environment = {
        **FAST_DETECTION,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(write_token(folder / "token")),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    before = dict(os.environ)
    os.environ.update(environment)
    _read_authentication_again()
    cluster = Nodes(environment)
    try:
        for each in resources:
            cluster.add(**each)
        yield cluster
    finally:
        cluster.shut_down()
        os.environ.clear()
        os.environ.update(before)
        _read_authentication_again()


class Program:
    """A running `hfdist`, its lines with the time of each."""

    def __init__(self, *arguments: str, environment: dict[str, str], cwd: Path) -> None:
        self.lines: list[tuple[float, str]] = []
        self.started = time.monotonic()
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hfdist", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append((time.monotonic(), line.rstrip("\n")))
                self._changed.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What --json printed of one kind."""
        found = []
        for _, line in list(self.lines):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == kind:
                    found.append(event)
        return found

    def wait_for(self, condition: Callable[[Program], bool], timeout: float) -> float:
        """Wait until the condition holds; returns the seconds it took."""
        began = time.monotonic()
        while not condition(self):
            left = timeout - (time.monotonic() - began)
            if left <= 0 or self.process.poll() is not None:
                raise AssertionError(f"it did not come in {timeout} s:\n{self.output}")
            with self._changed:
                self._changed.wait(min(left, 0.5))
        return time.monotonic() - began

    def end(self, timeout: float) -> int:
        """Wait for the end; returns the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def hfdist(*arguments: str, environment: dict[str, str], cwd: Path) -> Iterator[Program]:
    """Run `hfdist ARGUMENTS`; it is ended with the block."""
    program = Program(*arguments, environment=environment, cwd=cwd)
    try:
        yield program
    finally:
        program.stop()


def workers_of(run_dir: Path) -> list[psutil.Process]:
    """The processes of a run's present workers, by rank: the last of each rank's log."""
    found: list[psutil.Process] = []
    for path in sorted((run_dir / "logs").glob("rank-*.log")):
        ids = [
            line.split("process ")[1].split(",")[0]
            for line in path.read_text().splitlines()
            if "process " in line
        ]
        with contextlib.suppress(psutil.Error, IndexError):
            found.append(psutil.Process(int(ids[-1])))
    return found
