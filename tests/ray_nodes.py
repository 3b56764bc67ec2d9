"""Real Ray nodes on this machine, and `hfdist` as a process beside them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
STORE = 80 * 1024 * 1024  # bytes of object store a node
SPARE_BYTES = 300 * 10**6
FAST_DETECTION = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
}
SLOW_JOB = """
name: digits
task: slow.py:Slow
launch: {workers: 2, threads_per_worker: 1, timeout_seconds: 30}
checkpoint: {every: 1}
tracking: {system_metrics: false, log_model: false}
"""

SLOW_TASK = """
import time
from hfdist.tasks.digits import DigitsClassifier

class Slow(DigitsClassifier):
    def loss(self, *arguments):
        time.sleep(0.03)
        return super().loss(*arguments)
"""
"""Its steps take long enough to be disturbed."""


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
        self._signal(node, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)
        self.members.remove(node)

    def drain(self, node: Any, *, seconds: float) -> None:
        """Give notice that a node will be taken away, as the owners of spot instances do."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += ["--address", self.address, "--node-id", node.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(int(seconds))]
        subprocess.run(command, check=True, capture_output=True, timeout=240)

    def pause(self, node: Any) -> None:
        """Cut a node off: its raylet and all workers are there and answer nobody."""
        self._signal(node, signal.SIGSTOP)

    def go_on(self, node: Any) -> None:
        """End a `pause`."""
        self._signal(node, signal.SIGCONT)

    def reap(self, node: Any, timeout: float) -> None:
        """Wait for the end of a node that finds that it was taken for dead; its workers look whether it
        has left the system's table of processes."""
        node.all_processes["raylet"][0].process.wait(timeout)

    def kill_actors(self, *names: str) -> int:
        """Kill the processes of these actors' classes in that order; returns how many there were."""
        children = [c for node in self.members for c in _raylet(node).children(recursive=True)]
        found = [c for name in names for c in children if name in " ".join(c.cmdline())]
        for process in found:
            process.kill()
        return len(found)

    def node_of(self, process: psutil.Process) -> Any:
        """The node that a worker runs on."""
        above = {parent.pid for parent in process.parents()}
        (node,) = [node for node in self.members if _raylet(node).pid in above]
        return node

    def spares(self) -> list[psutil.Process]:
        """Processes that have torch in memory and nothing to do, of all nodes."""
        found = []
        for node in self.members:
            for child in _raylet(node).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    is_idle = "ray::IDLE" in " ".join(child.cmdline())
                    if is_idle and child.memory_info().rss > SPARE_BYTES:
                        found.append(child)
        return found

    def _signal(self, node: Any, number: int) -> None:
        raylet = _raylet(node)
        for process in (*raylet.children(recursive=True), raylet):
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def shut_down(self) -> None:
        for node in reversed(self.members):
            with contextlib.suppress(Exception):
                self._cluster.remove_node(node, allow_graceful=False)


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


@contextlib.contextmanager
def nodes(
    folder: Path, *resources: dict[str, Any], settings: Mapping[str, str] | None = None
) -> Iterator[Nodes]:
    """A cluster with one node for each of `resources`, with token authentication.

    Args:
        folder: For its token.
        resources: As `Nodes.add` takes them.
        settings: More variables of the nodes.
    """
    from hfdist.launch.ray.token import read_authentication_again, write_token

    environment = {
        **FAST_DETECTION,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(write_token(folder / "token")),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **(settings or {}),
    }
    before = dict(os.environ)
    os.environ.update(environment)
    read_authentication_again()
    cluster = Nodes(environment)
    try:
        for each in resources:
            cluster.add(**each)
        yield cluster
    finally:
        cluster.shut_down()
        os.environ.clear()
        os.environ.update(before)
        read_authentication_again()


class OwnCluster:
    """Nodes that `hfdist cluster` starts on this machine, for a user who has nothing yet.

    Args:
        home: The user's home.
        environment: More of the user's variables.
    """

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self.home = home
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), **environment}
        self.environment["OMP_NUM_THREADS"] = "1"
        self.address = f"127.0.0.1:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"

    def __call__(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """`hfdist ARGUMENTS` in the user's home."""
        return self._run([sys.executable, "-m", "hfdist", *arguments], more)

    def start_head(self, cpus: int) -> None:
        """Start the first node."""
        ports = [self.address.rpartition(":")[2], self.dashboard.rpartition(":")[2]]
        started = self(
            *("cluster", "start-head", "--port", ports[0], "--dashboard-port", ports[1]),
            *("--cpus", str(cpus)),
        )
        assert started.returncode == 0, started.stderr

    def join(self, cpus: int, *, without: Path | None = None) -> None:
        """Start another node; one that does not see what others put into the folder `without`."""
        command = [sys.executable, "-m", "hfdist", "cluster", "join", self.address]
        command += ["--cpus", str(cpus)]
        if without is not None:
            without.mkdir(parents=True, exist_ok=True)
            own = f"mount -t tmpfs none {shlex.quote(str(without))} && exec {shlex.join(command)}"
            command = ["unshare", "--mount", "sh", "-c", own]
        joined = self._run(command, {})
        assert joined.returncode == 0, joined.stderr

    def nodes(self) -> list[psutil.Process]:
        """The processes above the nodes, in the order of their start."""
        found = [json.loads(p.read_text()) for p in (self.home / ".hfdist/nodes").glob("*.json")]
        return [psutil.Process(node["pid"]) for node in sorted(found, key=lambda n: n["created"])]

    def kill(self, number: int) -> None:
        """End a node as a power cut does."""
        node = self.nodes()[number]
        for process in [node, *node.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _run(self, command: list[str], more: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=600,
            cwd=self.home,
            env={**self.environment, **more},
        )


@contextlib.contextmanager
def own_cluster(home: Path, **environment: str) -> Iterator[OwnCluster]:
    """An `OwnCluster`, stopped with the block."""
    cluster = OwnCluster(home, environment)
    try:
        yield cluster
    finally:
        stopped = cluster("cluster", "stop")
        assert stopped.returncode == 0, stopped.stderr
        forget_cluster(cluster.address)
    assert left_of(cluster.address) == []


def forget_cluster(address: str) -> None:
    """Remove what a cluster that `hfdist cluster` started has left."""
    from hfdist.launch.ray.nodes import scratch

    shutil.rmtree(scratch(int(address.rpartition(":")[2])))


def left_of(address: str, seconds: float = 60.0) -> list[str]:
    """Processes of a cluster that are still there after so long: a worker that was just about to start sees
    that its node is gone once it has imported what it needs."""
    port, deadline = address.rpartition(":")[2], time.monotonic() + seconds
    while True:
        left = [_cmdline(p) for p in psutil.process_iter(["cmdline"]) if port in _cmdline(p)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cmdline(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])


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
        self._reader.join(5)
        if self.process.stdout is not None and not self._reader.is_alive():
            self.process.stdout.close()


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


def write_slow_job(folder: Path) -> Path:
    """job.yaml, of two workers on the digits classifier, slowed down; its runs lie in `folder`/runs."""
    (folder / "slow.py").write_text(SLOW_TASK)
    path = folder / "job.yaml"
    path.write_text(SLOW_JOB + f"output: {folder / 'runs'}\n")
    return path
