"""Nodes of a Ray cluster on this machine: started with a token, stopped by process id."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hfdist.errors import ConfigError, WorkerError
from hfdist.launch.ray.loopback import VARIABLE, is_loopback
from hfdist.launch.ray.token import token_path, write_token

_START_SECONDS = 120.0
_START_TRIES = 3
"""Times that a node is started which is too slow for Ray, which waits half a minute."""
TOO_SLOW = "timed out during startup"
"""What Ray says of such a node."""
_STOP_SECONDS = 5.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Ray's own defaults take half a minute to see that a node is gone.
_DETECTION = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "3000",
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that was started here."""

    pid: int
    created: float
    """When the process began, so that another one with its number is not taken for it."""
    address: str
    """The cluster's."""
    log: str
    is_head: bool


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a node offers; None leaves it to Ray."""

    cpus: float | None = None
    gpus: float | None = None
    resources: dict[str, float] | None = None

    def arguments(self) -> list[str]:
        """As `ray start` takes them."""
        given = {"--num-cpus": self.cpus, "--num-gpus": self.gpus}
        found = [f"{key}={value:g}" for key, value in given.items() if value is not None]
        return found + ([f"--resources={json.dumps(self.resources)}"] if self.resources else [])


def start_head(*, host: str, port: int, dashboard_port: int, size: Size) -> Node:
    """Start a cluster's first node.

    Args:
        host: Address of this machine by which others reach it; 127.0.0.1 for none.
        port: Of the cluster.
        dashboard_port: Of its dashboard and jobs.
        size: What the node offers.

    Raises:
        ConfigError: The node does not start: a port is taken, the address is not this machine's.
    """
    token = token_path()
    if not token.exists():
        write_token(token)
    arguments = [
        "--head",
        f"--node-ip-address={host}",
        f"--port={port}",
        f"--dashboard-host={host}",
        f"--dashboard-port={dashboard_port}",
    ]
    if is_loopback(host):
        # Jobs look in this folder for the cluster to connect to, and Ray's own is the whole machine's.
        arguments.append(f"--temp-dir={scratch(port)}")
    return _start(arguments, f"{host}:{port}", size, is_head=True, loopback=is_loopback(host))


def join(address: str, *, host: str | None, size: Size) -> Node:
    """Let this machine join a cluster.

    Args:
        address: HOST:PORT of the head.
        host: Address of this machine by which the head reaches it; by default found by Ray.
        size: What the node offers.

    Raises:
        ConfigError: There is no token, or the node does not start.
    """
    if not token_path().is_file():
        raise ConfigError(
            f"there is no token in {token_path()}: copy the head's there, with mode 0600"
        )
    loopback = is_loopback(address.rpartition(":")[0])
    host = host or ("127.0.0.1" if loopback else None)
    arguments = [f"--address={address}", *([f"--node-ip-address={host}"] if host else [])]
    return _start(arguments, address, size, is_head=False, loopback=loopback)


def _start(
    arguments: list[str], address: str, size: Size, *, is_head: bool, loopback: bool
) -> Node:
    _check_mode(token_path())
    folder = _folder()
    log = folder / f"node-{time.time_ns()}.log"
    environment = {
        **_DETECTION,
        **os.environ,
        "RAY_AUTH_MODE": "token",  # the token itself stays in its file
        "RAY_AUTH_TOKEN_PATH": str(token_path()),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Jobs run the python of this installation.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    if loopback:
        # Clusters of several users on one machine: an agent at Ray's usual port would get all their jobs.
        arguments = [*arguments, "--dashboard-agent-listen-port=0"]
        # gloo takes the address of the host's name, which may be that of another machine.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        environment[VARIABLE] = "0"
    program = "hfdist.launch.ray.loopback" if loopback else "ray.scripts.scripts"
    command = [sys.executable, "-m", program, "start", "--block", *arguments]
    for left in reversed(range(_START_TRIES)):
        process = _begin([*command, *size.arguments()], log, environment)
        text = _word_of(process, log)
        if text is None:
            break
        if left and TOO_SLOW in text:
            continue
        words = [line for line in _COLOUR.sub("", text).splitlines() if line.strip()]
        said = words[-1].strip() if words else "no word"
        raise ConfigError(f"the node does not start: {said} ({log})")
    import psutil

    node = Node(
        pid=process.pid,
        created=psutil.Process(process.pid).create_time(),
        address=address,
        log=str(log),
        is_head=is_head,
    )
    (folder / f"node-{node.pid}.json").write_text(json.dumps(asdict(node)))
    return node


def _begin(
    command: list[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _word_of(process: subprocess.Popen[bytes], log: Path) -> str | None:
    """What a node says that does not start, which is then ended; None once it has started."""
    deadline = time.monotonic() + _START_SECONDS
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            return log.read_text(errors="replace")
        time.sleep(0.2)
    return None


def nodes_here() -> list[Node]:
    """The nodes that were started on this machine and still run."""
    import psutil

    found = []
    for path in sorted(_folder().glob("node-*.json")):
        node = Node(**json.loads(path.read_text()))
        try:
            alive = abs(psutil.Process(node.pid).create_time() - node.created) < 1.0
        except psutil.Error:
            alive = False
        if alive:
            found.append(node)
        else:
            path.unlink(missing_ok=True)
    return found


def head_here() -> str | None:
    """Address of the cluster whose head was started here, if there is one."""
    return next((node.address for node in nodes_here() if node.is_head), None)


def stop_nodes() -> list[Node]:
    """Stop the nodes that were started here, the head last.

    Raises:
        WorkerError: One does not end.
    """
    import psutil

    nodes = sorted(nodes_here(), key=lambda node: node.is_head)
    for node in nodes:
        process = psutil.Process(node.pid)
        family = [process, *process.children(recursive=True)]
        for number, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, 5.0)):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(number)
            family = psutil.wait_procs(family, timeout=patience)[1]
        if family:
            raise WorkerError(f"node {node.pid} does not end: see {node.log}")
        (_folder() / f"node-{node.pid}.json").unlink(missing_ok=True)
    return nodes


def scratch(port: int) -> Path:
    """Where the nodes of a cluster of this machine alone keep sockets and logs."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    # Sockets have short names, which rules a Mac's folder of temporary files out.
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp") / f"ray-{user}-{port}"


def _folder() -> Path:
    folder = Path.home() / ".hfdist" / "nodes"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_mode(token: Path) -> None:
    if token.stat().st_mode & 0o077:
        raise ConfigError(f"others can read the token in {token}: chmod 600 {token}")
