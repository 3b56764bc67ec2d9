"""deploy/kuberay, rendered by kubectl: valid for Kubernetes and KubeRay, and complete.

Nothing is sent to a cluster: these tests need kubectl for `kubectl kustomize` alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psutil
import pytest
import yaml

import hfdist
from hfdist.config.job import load_config

ROOT = Path(__file__).resolve().parents[3]
FILES = ROOT / "deploy" / "kuberay"
PLACES = ("cluster", "job")
SECRETS = {"hfdist-passwords", "hfdist-s3"}
"""Those that the user makes; the second is optional."""

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None,
    reason="kubectl is not on the PATH: nothing renders deploy/kuberay",
)


def render(folder: Path) -> list[dict[str, Any]]:
    found = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 0, found.stderr
    return [each for each in yaml.safe_load_all(found.stdout) if each]


@functools.cache
def rendered(place: str) -> list[dict[str, Any]]:
    return render(FILES / place)


def the(kind: str, objects: list[dict[str, Any]], name: str | None = None) -> dict[str, Any]:
    (found,) = [
        each
        for each in objects
        if each["kind"] == kind and name in (None, each["metadata"]["name"])
    ]
    return found


def cluster_spec(objects: list[dict[str, Any]]) -> dict[str, Any]:
    for each in objects:
        if each["kind"] == "RayCluster":
            return each["spec"]
        if each["kind"] == "RayJob":
            return each["spec"]["rayClusterSpec"]
    raise AssertionError("there is no cluster")


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The specification of every pod."""
    for each in objects:
        if each["kind"] in ("Deployment", "StatefulSet"):
            yield each["spec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in groups(cluster_spec(objects)))


def containers(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [container for pod in pods(objects) for container in pod["containers"]]


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("place", PLACES)
def test_kubernetes_accepts_them(place: str, version: str) -> None:
    objects = rendered(place)
    core = [each for each in objects if not each["apiVersion"].startswith("ray.io/")]
    templates = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": group.get("groupName", "head")},
            "spec": group["template"]["spec"],
        }
        for group in groups(cluster_spec(objects))
    ]
    assert {"Service", "PersistentVolumeClaim", "Deployment", "StatefulSet"} <= {
        each["kind"] for each in core
    }
    assert len(templates) == 3
    for each in core + templates:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("place", PLACES)
def test_kuberay_accepts_them(place: str) -> None:
    schema = yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text())
    own = [each for each in rendered(place) if each["apiVersion"].startswith("ray.io/")]
    assert [each["kind"] for each in own] == [{"cluster": "RayCluster", "job": "RayJob"}[place]]
    for each in own:
        jsonschema.validate(each, schema)
        wrong = copy.deepcopy(each)
        cluster_spec([wrong])["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # not a word
        with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("place", PLACES)
def test_no_setting_is_left_open(place: str) -> None:
    assert "from-settings" not in yaml.safe_dump(rendered(place))
    assert not [each for each in rendered(place) if each["kind"] == "Settings"]


@pytest.mark.parametrize("place", PLACES)
def test_settings_get_where_they_belong(place: str, tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path / "kuberay")
    path = tmp_path / "kuberay" / "cluster" / "settings.yaml"
    settings = yaml.safe_load(path.read_text())
    names = set(settings["spec"])
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "7Gi"}}}
    settings["spec"] = {
        "image": "registry.example/hfdist:9",
        "postgresImage": "registry.example/postgres:9",
        "head": {"cpu": "3", "memory": "5Gi"},
        "cpuWorkers": {"min": 1, "max": 11, "size": {"cpu": "6", "memory": "9Gi"}},
        "gpuWorkers": {"min": 2, "max": 12, "size": {"cpu": "7", "nvidia.com/gpu": "4"}},
        "sharedMemory": "13Gi",
        "runs": {**claim, "storageClassName": "a"},
        "database": {**claim, "storageClassName": "b"},
        "artifacts": {**claim, "storageClassName": "c"},
        "artifactsDestination": "s3://bucket/prefix",
    }
    assert set(settings["spec"]) == names
    path.write_text(yaml.safe_dump(settings))
    objects = render(tmp_path / "kuberay" / place)

    spec = cluster_spec(objects)
    head, cpu, gpu = groups(spec)
    images = [container["image"] for container in containers(objects)]
    assert sorted(images) == ["registry.example/hfdist:9"] * 4 + ["registry.example/postgres:9"]
    limits = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups(spec)
    ]
    assert limits == [
        settings["spec"]["head"],
        settings["spec"]["cpuWorkers"]["size"],
        settings["spec"]["gpuWorkers"]["size"],
    ]
    assert (cpu["groupName"], cpu["minReplicas"], cpu["maxReplicas"]) == ("cpu", 1, 11)
    assert (gpu["groupName"], gpu["minReplicas"], gpu["maxReplicas"]) == ("gpu", 2, 12)
    for group in (head, cpu, gpu):
        volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
        assert volumes["shm"]["emptyDir"]["sizeLimit"] == "13Gi"
    claims = {
        "runs": the("PersistentVolumeClaim", objects, "hfdist-runs")["spec"],
        "artifacts": the("PersistentVolumeClaim", objects, "hfdist-artifacts")["spec"],
        "database": the("StatefulSet", objects)["spec"]["volumeClaimTemplates"][0]["spec"],
    }
    assert claims == {name: settings["spec"][name] for name in claims}
    mlflow = the("Deployment", objects)["spec"]["template"]["spec"]["containers"][0]
    environment = {each["name"]: each.get("value") for each in mlflow["env"]}
    assert environment["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://bucket/prefix"


@pytest.mark.parametrize("place", PLACES)
def test_what_is_named_exists(place: str) -> None:
    objects = rendered(place)
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for pod in pods(objects):
        own = {
            t["metadata"]["name"]
            for t in the("StatefulSet", objects)["spec"]["volumeClaimTemplates"]
        }
        volumes = {volume["name"] for volume in pod.get("volumes", [])} | own
        for volume in pod.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there
            if config := volume.get("configMap"):
                assert ("ConfigMap", config["name"]) in there or config["optional"]
            if secret := volume.get("secret"):
                assert secret["secretName"] in SECRETS
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            for source in container.get("envFrom", []):
                assert source["secretRef"] == {"name": "hfdist-s3", "optional": True}
    # Hosts in addresses are services, and services lead to pods.
    ports = {s["metadata"]["name"]: s["spec"] for s in objects if s["kind"] == "Service"}
    addresses = re.findall(
        r"\w+://(?:\w+@)?([\w.-]+)(?::(\d+))?", yaml.safe_dump(list(pods(objects)))
    )
    assert {host for host, _ in addresses} == {"mlflow", "postgres"}
    for host, port in addresses:
        assert port in ("", str(ports[host]["ports"][0]["port"]))
        labels = [
            each["spec"]["template"]["metadata"]["labels"]
            for each in objects
            if each["kind"] in ("Deployment", "StatefulSet")
        ]
        assert sum(ports[host]["selector"].items() <= each.items() for each in labels) == 1


@pytest.mark.parametrize("place", PLACES)
def test_nobody_has_more_rights_than_needed(place: str) -> None:
    objects = rendered(place)
    for pod in pods(objects):
        assert pod["securityContext"]["runAsNonRoot"]
    for container in containers(objects):
        context = container["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    # The head's autoscaler asks Kubernetes for pods; nobody else may.
    with_token = [pod for pod in pods(objects) if pod.get("automountServiceAccountToken", True)]
    assert [pod["containers"][0]["name"] for pod in with_token] == ["ray-head"]
    assert cluster_spec(objects)["authOptions"] == {"mode": "token"}


def test_versions_are_those_of_the_image() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert cluster_spec(rendered("cluster"))["rayVersion"] == pins["ray"]
    settings = yaml.safe_load((FILES / "cluster" / "settings.yaml").read_text())["spec"]
    assert settings["image"] == f"hfdist:{hfdist.__version__}"


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_parameters_and_probes_are_rays() -> None:
    from ray._private import ray_constants
    from ray.scripts.scripts import start

    options = {name for option in start.params for name in option.opts}
    spec = cluster_spec(rendered("cluster"))
    for group in groups(spec):
        assert {f"--{name}" for name in group["rayStartParams"]} <= options
    head, *workers = (group["template"]["spec"]["containers"][0] for group in groups(spec))
    for probe in ("readinessProbe", "livenessProbe"):
        assert head[probe]["httpGet"] == {
            "path": "/api/gcs_healthz",
            "port": ray_constants.DEFAULT_DASHBOARD_PORT,
        }
        for worker in workers:
            assert worker[probe]["httpGet"] == {
                "path": "/api/local_raylet_healthz",
                "port": ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT,
            }


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_probes_are_answered_and_the_rest_is_not() -> None:
    """A head started with the file's parameters, and a token as KubeRay sets it."""
    head = cluster_spec(rendered("cluster"))["headGroupSpec"]
    container = head["template"]["spec"]["containers"][0]
    dashboard, agent = free_ports(2)
    folder = tempfile.mkdtemp(prefix="hf-")  # short: sockets have short names
    program = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--port=0"]
        + [f"--{name}={value}" for name, value in head["rayStartParams"].items()]
        + [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        + ["--object-store-memory=80000000", f"--temp-dir={folder}"],
        env={
            **os.environ,
            **{each["name"]: each["value"] for each in container["env"] if "value" in each},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        groups_ = groups(cluster_spec(rendered("cluster")))
        for group, port in zip(groups_, (dashboard, agent, agent), strict=True):
            for probe in ("readinessProbe", "livenessProbe"):
                probed = group["template"]["spec"]["containers"][0][probe]["httpGet"]["path"]
                assert status(f"http://127.0.0.1:{port}{probed}", patience=120.0) == 200
        assert status(f"http://127.0.0.1:{dashboard}/api/jobs/") in (401, 403)
    finally:
        family = psutil.Process(program.pid).children(recursive=True)
        program.terminate()
        for each in psutil.wait_procs([psutil.Process(program.pid), *family], timeout=80)[1]:
            each.kill()
        program.wait(5)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def status(address: str, patience: float = 0.0) -> int:
    """The answer's status, after some patience with a server that is not there or not ready (503)."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                return error.code
            time.sleep(0.5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


# -- the job -------------------------------------------------------------------------------------------


def test_the_job_has_the_cluster_that_stays() -> None:
    job = the("RayJob", rendered("job"))["spec"]
    assert job["rayClusterSpec"] == the("RayCluster", rendered("cluster"))["spec"]
    rest = [
        [e for e in rendered(place) if e["kind"] not in ("RayCluster", "RayJob", "ConfigMap")]
        for place in PLACES
    ]
    assert rest[0] == rest[1]  # both may be applied to one namespace
    # The submitter's shell and the job's shell leave these words as they are.
    assert shlex.split(job["entrypoint"]) == job["entrypoint"].split()
    assert re.fullmatch(r"[\w/ .-]+", job["entrypoint"])


def test_the_jobs_workers_fit_its_nodes(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(the("ConfigMap", rendered("job"))["data"]["job.yaml"])
    launch = load_config(tmp_path / "job.yaml", ["launch.backend=ray"]).launch
    there = room = 0
    spec = cluster_spec(rendered("job"))
    sizes = [
        float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in spec["workerGroupSpecs"]
    ]
    for size, group in zip(sizes, spec["workerGroupSpecs"], strict=True):
        fit = int(size // launch.cpus_per_worker)
        there += fit * group["minReplicas"]
        room += fit * group["maxReplicas"]
    fewest, most = launch.workers
    assert fewest <= there  # nothing asks for the nodes of a run that has not begun
    assert most <= room


def test_a_job_that_comes_back_goes_on(tmp_path: Path) -> None:
    """The entrypoint as the pod runs it, with a `hfdist` that says what it was asked."""
    for name, text in the("ConfigMap", rendered("job"))["data"].items():
        (tmp_path / "job").mkdir(exist_ok=True)
        (tmp_path / "job" / name).write_text(text)
    (tmp_path / "hfdist").write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    (tmp_path / "hfdist").chmod(0o755)
    entrypoint = the("RayJob", rendered("job"))["spec"]["entrypoint"]
    words = shlex.split(entrypoint.replace("/work/", f"{tmp_path}/"))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def said() -> list[str]:
        return subprocess.check_output(words, env=environment, text=True, timeout=80).splitlines()

    run = f"{tmp_path}/runs/digits"
    cluster = ["launch.backend=ray", "launch.address=auto", "--plain"]
    first = ["train", "job/job.yaml", f"output={tmp_path}/runs", "--run-id", "digits", *cluster]
    assert said() == [str(tmp_path), *first]
    Path(run).mkdir(parents=True)
    (Path(run) / "config.yaml").touch()
    assert said() == [str(tmp_path), "resume", "runs/digits", *cluster]
    mounts = {
        mount["name"]: mount["mountPath"]
        for container in containers(rendered("job"))
        for mount in container["volumeMounts"]
    }
    assert (mounts["job"], mounts["runs"]) == ("/work/job", "/work/runs")
