"""A Docker engine and its client, the images under test, and a cluster of containers made of them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGE, POSTGRES = "hfdist:test", "hfdist-postgres:test"
BASE = os.environ.get("HFDIST_TEST_BASE", "debian:bookworm-slim")
"""Base of the images: any Debian with Python 3.11 or newer."""
CLUSTER = str(ROOT / "docker" / "cluster")


def run(
    *command: str,
    timeout: float = 120,
    check: bool = True,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Output (both streams) of a command.

    Raises:
        AssertionError: It failed, if `check`.
    """
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0 or not check, f"{' '.join(command)}:\n{done.stdout[-8000:]}"
    return done.stdout


@functools.cache
def client() -> str:
    """A client that speaks BuildKit: with buildx, or old enough to bring its own."""
    for found in dict.fromkeys((shutil.which("docker"), "/usr/bin/docker")):
        if found is None or not Path(found).exists():
            continue
        version = run(found, "version", "--format", "{{.Client.Version}}", check=False)
        if run(found, "buildx", "version", check=False).startswith("github.com") or (
            version[:2].isdigit() and int(version[:2]) < 23
        ):
            return found
    return shutil.which("docker") or "docker"


def why_not() -> str | None:
    """Why containers cannot be run here; None if they can."""
    if shutil.which("docker") is None:
        return (
            "no Docker here: install an engine (docker.io), start dockerd, then `make image-test`"
        )
    if shutil.which("docker-compose") is None and "Compose" not in run(
        "docker", "compose", "version", check=False
    ):
        return "no Docker Compose here: install docker-compose, then `make image-test`"
    answer = run(client(), "version", "--format", "{{.Server.Version}}", check=False, timeout=30)
    if not answer[:1].isdigit():
        said = " ".join(answer.split())[:200]
        return (
            "no Docker engine answers: start dockerd (with --iptables=false where the kernel lacks it),"
            f" then `make image-test` ({said})"
        )
    return None


def docker(*arguments: str, timeout: float = 120, check: bool = True) -> str:
    """Output of a docker command."""
    return run(client(), *arguments, timeout=timeout, check=check)


def has_image(name: str) -> bool:
    return bool(docker("images", "--quiet", name).strip())


def make_base(name: str) -> None:
    """Pull a base image, or make it: no registry can be reached from everywhere."""
    if has_image(name):
        return
    try:
        docker("pull", "--quiet", name, timeout=300)
        return
    except (AssertionError, subprocess.TimeoutExpired):
        pass
    assert shutil.which("debootstrap"), f"{name} cannot be pulled: install debootstrap, run as root"
    with tempfile.TemporaryDirectory() as folder:
        run("debootstrap", "--variant=minbase", "bookworm", folder, timeout=900)
        archive = subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE)
        subprocess.run([client(), "import", "-", name], stdin=archive.stdout, check=True)
        assert archive.wait() == 0


def build(name: str, folder: Path, dockerfile: str, *arguments: str, timeout: float) -> None:
    """Build an image with BuildKit, behind a proxy's certificate where pip has one."""
    certificate = os.environ.get("PIP_CERT", "")
    secret = ["--secret", f"id=ca,src={certificate}"] if certificate else []
    run(
        *(client(), "build", "--network", "host", "--progress", "plain", *secret),
        *("--build-arg", f"BASE={BASE}", *arguments, "-f", dockerfile, "-t", name, "."),
        timeout=timeout,
        environment={"DOCKER_BUILDKIT": "1"},
        cwd=folder,
    )


class Cluster:
    """The cluster of docker/compose.yaml, under the client that `client` chose.

    Args:
        folder: For its secrets and a link to the client.
    """

    def __init__(self, folder: Path) -> None:
        (folder / "bin").mkdir()
        (folder / "bin" / "docker").symlink_to(client())
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HFDIST_SECRETS_DIR": str(folder / "secrets"),
            "HFDIST_IMAGE": IMAGE,
            "POSTGRES_IMAGE": POSTGRES,
            "HFDIST_PROJECT": "hfdist-test",
            "HFDIST_DASHBOARD_PORT": "18265",
            "HFDIST_MLFLOW_PORT": "15000",
        }
        self.secrets = folder / "secrets"

    def __call__(self, *verb: str, timeout: float = 600, cwd: Path | None = None) -> str:
        """Output of `docker/cluster VERB`."""
        return run("bash", CLUSTER, *verb, timeout=timeout, environment=self.environment, cwd=cwd)

    def start(self, *verb: str, cwd: Path) -> subprocess.Popen[str]:
        """`docker/cluster VERB`, in the background."""
        return subprocess.Popen(
            ["bash", CLUSTER, *verb],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment},
            cwd=cwd,
        )

    def containers(self, service: str) -> list[str]:
        """Names of a service's containers, running or not."""
        labels = (
            "label=com.docker.compose.project=hfdist-test",
            f"label=com.docker.compose.service={service}",
        )
        filters = [part for label in labels for part in ("--filter", label)]
        return sorted(docker("ps", "--all", *filters, "--format", "{{.Names}}").split())

    def read(self, path: str) -> str:
        """A file of the nodes' common folder; empty if there is none."""
        (head,) = self.containers("head")
        return docker("exec", head, "bash", "-c", f"cat {path} 2>/dev/null || true")

    def python(self, program: str, *arguments: str) -> str:
        """What a program prints on the head, with the secrets of its role."""
        (head,) = self.containers("head")
        return docker("exec", head, "entrypoint", "python", "-c", program, *arguments, timeout=180)


def steps(cluster: Cluster, run_id: str) -> list[int]:
    """Steps in a run's own record."""
    lines = cluster.read(f"runs/{run_id}/metrics.jsonl").splitlines()
    # The last line may be half-written.
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> float:
    """Wait until something holds; how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what}: not after {seconds:.0f} s"
        time.sleep(1.0)
    return time.monotonic() - began


def ended(process: subprocess.Popen[str], timeout: float) -> tuple[int, str]:
    """Exit status and output of a process that is about to end."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    return process.returncode, output


def in_image(*command: str, options: Sequence[str] = ()) -> str:
    """Output of a program in a container of the image under test."""
    return docker("run", "--rm", *options, IMAGE, *command)
