"""docker/compose.yaml, docker/cluster and the Dockerfile, as far as they show without an engine."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "docker"
TEXT = (DOCKER / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "HFDIST_IMAGE" in service["image"]]
NODES = ["head", "worker", "worker-gpu"]


def test_ports_are_open_to_this_machine_alone() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(ports) == {"head", "mlflow"}
    for published in ports.values():
        assert all(port.startswith("127.0.0.1:") for port in published)
    assert not any("network_mode" in service for service in SERVICES.values())


def test_secrets_are_files() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"${{HFDIST_SECRETS_DIR:-./secrets}}/{name}"}
    for service in SERVICES.values():
        assert set(service["secrets"]) <= set(COMPOSE["secrets"])
    # The database's password is not for nodes, on which jobs run.
    for name in NODES:
        assert "postgres_password" not in SERVICES[name]["secrets"]


@pytest.mark.parametrize("service", SERVICES)
def test_no_password_is_in_an_environment_or_a_command(service: str) -> None:
    for key, value in SERVICES[service].get("environment", {}).items():
        if re.search("password|token|secret|key", key, re.IGNORECASE):
            assert key.endswith("_FILE"), key
            assert value.startswith("/run/secrets/")
        assert not re.search(r"://[^/]*:[^/]*@", str(value)), "a password in an address"
    assert not re.search("password|token", " ".join(SERVICES[service].get("command", [])))


def test_every_service_says_whether_it_is_well() -> None:
    assert SERVICES["postgres"]["healthcheck"]["test"][0] == "CMD"
    assert re.search(r"^HEALTHCHECK .* CMD \[\"health\"\]", dockerfile(), re.MULTILINE)
    assert not any("healthcheck" in SERVICES[name] for name in OURS)
    for service, needs in (("worker", "head"), ("worker-gpu", "head"), ("mlflow", "postgres")):
        assert SERVICES[service]["depends_on"] == {needs: {"condition": "service_healthy"}}


def test_roles_are_those_of_the_image() -> None:
    roles = {SERVICES[name]["command"][0] for name in OURS if "command" in SERVICES[name]}
    assert roles == {"head", "worker", "mlflow"}
    entrypoint = (DOCKER / "entrypoint").read_text()
    assert roles == set(re.findall(r"^    as (\w+)$", entrypoint, re.MULTILINE))
    (pages,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((DOCKER / "health").read_text()).body
        if isinstance(node, ast.Assign)
    )
    assert roles == set(pages)


@pytest.mark.parametrize("service", OURS)
def test_containers_can_do_little(service: str) -> None:
    assert SERVICES[service]["cap_drop"] == ["ALL"]
    assert SERVICES[service]["security_opt"] == ["no-new-privileges:true"]
    assert not SERVICES[service].get("privileged")


def test_what_must_last_is_in_volumes() -> None:
    used = {
        name: [volume.split(":")[0] for volume in service.get("volumes", [])]
        for name, service in SERVICES.items()
    }
    assert {volume for volumes in used.values() for volume in volumes} == set(COMPOSE["volumes"])
    assert used["postgres"] == ["database"]
    assert used["mlflow"] == ["artifacts"]
    for name in NODES:
        assert used[name] == ["runs"]
        assert SERVICES[name]["shm_size"]  # Docker's own 64 MB are too few for Ray


def test_gpus_and_the_client_are_asked_for() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles["worker-gpu"] == ["gpu"]
    assert profiles["client"] == ["client"]
    assert not any(profiles[name] for name in ("head", "worker", "mlflow", "postgres"))
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_variables_have_defaults_and_are_named_at_the_top() -> None:
    head = TEXT[: TEXT.index("x-node")]
    variables = set(re.findall(r"\$\{(\w+)", TEXT))
    assert variables
    assert variables == set(re.findall(r"\$\{(\w+):-", TEXT))
    assert variables <= set(re.findall(r"\w+", head))


def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def test_the_build_sees_what_it_copies_and_no_secrets() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile(), re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    assert {source.replace("[s]", "s") for source in copied} == allowed
    assert not any("secret" in path for path in allowed)


def cluster(
    *arguments: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    found = {**os.environ, **environment} | ({"PATH": str(path)} if path else {})
    return subprocess.run(
        ["/bin/bash", str(DOCKER / "cluster"), *arguments],
        env=found,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_cluster_lists_its_verbs() -> None:
    done = cluster()
    assert done.returncode == 0
    for verb in ("up", "submit", "hfdist", "ui", "down"):
        assert re.search(rf"^  {verb}\b", done.stdout, re.MULTILINE)
    assert cluster("sideways").returncode == 2


def test_a_job_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    done = cluster("submit", str(tmp_path / "job.yaml"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"no job file {tmp_path / 'job.yaml'}"]


def test_up_makes_secrets_once_for_their_owner(tmp_path: Path) -> None:
    """On a PATH without Docker: the rest of `up` has nothing to start, and says so."""
    programs, secrets = tmp_path / "bin", tmp_path / "secrets"
    programs.mkdir()
    for program in ("bash", "chmod", "dirname", "head", "mkdir", "od", "tr"):
        found = shutil.which(program)
        assert found
        (programs / program).symlink_to(found)

    done = cluster("up", path=programs, HFDIST_SECRETS_DIR=str(secrets))
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["no Docker Compose here: install docker-compose"]
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    made = {file.name: file.read_text() for file in secrets.iterdir()}
    assert set(made) == set(COMPOSE["secrets"])
    assert len(set(made.values())) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in made.values())

    cluster("up", path=programs, HFDIST_SECRETS_DIR=str(secrets))
    assert {file.name: file.read_text() for file in secrets.iterdir()} == made


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose here")
def test_compose_accepts_it() -> None:
    done = subprocess.run(
        ["docker-compose", "-f", str(DOCKER / "compose.yaml"), "config", "--quiet"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
