"""The image, and a cluster of its containers that loses one of them in every way (`make image-test`)."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from engine import (
    BASE,
    IMAGE,
    POSTGRES,
    ROOT,
    Cluster,
    build,
    docker,
    ended,
    has_image,
    in_image,
    make_base,
    steps,
    wait_for,
    why_not,
)

AS_ROOT = ("--user", "0", "--entrypoint", "bash")
pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]

JOB = """
name: digits
task: slow.py:Slow
steps: 4000
checkpoint: {every: 1}
launch: {backend: ray, workers: [1, 2], threads_per_worker: 1, max_failures: 20, timeout_seconds: 15}
"""
TASK = """
import time
from hfdist.tasks.digits import DigitsClassifier

class Slow(DigitsClassifier):
    def loss(self, *arguments):
        time.sleep(0.05)
        return super().loss(*arguments)
"""
HISTORY = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient()
(experiment,) = [e for e in client.search_experiments() if e.name == "hfdist"]
(run,) = client.search_runs([experiment.experiment_id], f"tags.`hfdist.run_id` = '{sys.argv[1]}'")
history = client.get_metric_history(run.info.run_id, "loss")
print(json.dumps([run.info.status, sorted(m.step for m in history)]))
"""
PREDICT = """
import sys, torch, mlflow
client = mlflow.MlflowClient()
(experiment,) = [e for e in client.search_experiments() if e.name == "hfdist"]
(run,) = client.search_runs([experiment.experiment_id], f"tags.`hfdist.run_id` = '{sys.argv[1]}'")
(model,) = run.outputs.model_outputs
print(tuple(mlflow.pytorch.load_model(f"models:/{model.model_id}")(torch.zeros(2, 64)).shape))
"""


@pytest.fixture(scope="module")
def images() -> None:
    """Both images, built from this tree."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    make_base(BASE)
    index = os.environ.get("HFDIST_TEST_TORCH_INDEX", "")
    cpu = ("--build-arg", f"TORCH_INDEX={index}") if index else ()
    build(IMAGE, ROOT, "docker/Dockerfile", *cpu, timeout=1400)
    if not has_image(POSTGRES):
        build(POSTGRES, ROOT / "tests" / "docker" / "postgres", "Dockerfile", timeout=600)


@pytest.fixture(scope="module")
def cluster(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Head, two workers, MLflow, PostgreSQL."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made("down", "--volumes")
        print(made("up", "2"))
        yield made
    finally:
        made("down", "--volumes")


def test_the_image_has_what_it_needs_and_no_more(images: None) -> None:
    facts = json.loads(docker("inspect", IMAGE))[0]
    labels, config = facts["Config"]["Labels"], facts["Config"]
    assert labels["org.opencontainers.image.title"] == "hfdist"
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["tini", "--", "entrypoint"]
    assert config["Healthcheck"]["Test"] == ["CMD", "health"]
    assert in_image("bash", "-c", "id -u").strip() == "10001"
    assert in_image("bash", "-c", "type -p gcc g++ cc make git || true").strip() == ""
    assert "Usage" in in_image("--help")
    assert in_image("version")
    # What is written belongs into volumes.
    assert "read-only" in in_image(
        "bash", "-c", "touch /opt/app/x 2>&1 || echo read-only", options=["--read-only"]
    )
    size = facts["Size"] / 1e9
    print(f"the image has {size:.2f} GB")
    if os.environ.get("HFDIST_TEST_TORCH_INDEX"):
        assert size < 3.0


def test_its_layers_do_not_depend_on_when_they_are_made(images: None) -> None:
    """Files have the times of the release, and no caches or logs of the build lie about."""
    newer = in_image(
        "bash", "-c", "find /opt/hfdist /opt/app -newermt 2023-11-15 -not -type d | head -n 3"
    )
    assert newer.strip() == ""
    caches = "/root/.cache /home/hfdist/.cache /var/cache/apt/archives/*.deb /var/lib/apt/lists/*"
    left = in_image("-c", f"ls -d {caches} 2>/dev/null || true", options=AS_ROOT)
    assert left.strip() == ""


def test_health_is_that_of_the_role(images: None) -> None:
    """A node that does not answer is not well; a command of hfdist is while it runs."""
    assert in_image("bash", "-c", "health && echo well").strip() == "well"
    for role in ("head", "worker", "mlflow"):
        ask = f"echo {role} >/tmp/hfdist-role; health 2>&1 && echo well || true"
        assert in_image("bash", "-c", ask).startswith(f"{role}: "), role


def test_an_unknown_role_is_one_message(images: None) -> None:
    output = docker("run", "--rm", IMAGE, "nothing-of-the-kind", check=False)
    assert "No such command" in output
    assert "Traceback" not in output


def test_all_are_well_under_tini(cluster: Cluster) -> None:
    for service, number in (("head", 1), ("worker", 2), ("mlflow", 1), ("postgres", 1)):
        names = cluster.containers(service)
        assert len(names) == number
        for name in names:
            state = json.loads(docker("inspect", name))[0]["State"]
            assert state["Health"]["Status"] == "healthy", name
            if service != "postgres":
                assert docker("exec", name, "cat", "/proc/1/comm").strip() == "tini"
                assert docker("exec", name, "id", "-u").strip() == "10001"


def test_pages_are_closed_to_strangers(cluster: Cluster) -> None:
    """MLflow wants the password, Ray's jobs the token; both listen on this machine alone."""

    def status(url: str, **headers: str) -> int:
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    runs = "http://127.0.0.1:15000/api/2.0/mlflow/experiments/get?experiment_id=0"
    jobs = "http://127.0.0.1:18265/api/jobs/"
    password = (cluster.secrets / "mlflow_password").read_text()
    token = (cluster.secrets / "ray_token").read_text()
    basic = b64encode(f"admin:{password}".encode()).decode()
    assert status(runs) == 401
    assert status(runs, Authorization=f"Basic {basic}") == 200
    assert status(jobs) == 401
    assert status(jobs, Authorization=f"Bearer {token}") == 200
    for service, port in (("head", "8265/tcp"), ("mlflow", "5000/tcp")):
        (name,) = cluster.containers(service)
        facts = json.loads(docker("inspect", name))[0]
        (binding,) = facts["HostConfig"]["PortBindings"][port]
        assert binding["HostIp"] == "127.0.0.1"
        assert password not in json.dumps(facts["Config"])
        assert token not in json.dumps(facts["Config"])


def test_a_run_outlives_its_containers(cluster: Cluster, tmp_path: Path) -> None:
    """One worker is killed, one paused, one cut off; then everything is restarted."""
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "slow.py").write_text(TASK)
    submission = cluster.start("submit", "job.yaml", "--run-id", "lasting", cwd=tmp_path)
    try:
        _lose_workers(cluster)
        cluster("hfdist", "jobs", "stop", "lasting")
        status, output = ended(submission, 180)
    finally:
        submission.kill()
    result = json.loads(cluster.read("runs/lasting/result.json") or "{}")
    assert result.get("status") == "KILLED", f"exit {status}\n{output[-6000:]}"
    resumed = cluster(
        *("hfdist", "resume", "lasting", "--address", "http://head:8265", "--follow"),
        f"steps={result['steps'] + 5}",
    )
    result = json.loads(cluster.read("runs/lasting/result.json"))
    assert result["status"] == "FINISHED", resumed[-6000:]
    expected = ["FINISHED", list(range(result["steps"]))]
    assert steps(cluster, "lasting") == expected[1]
    assert json.loads(cluster.python(HISTORY, "lasting")) == expected

    cluster("down")
    cluster("up", "2")
    assert json.loads(cluster.read("runs/lasting/result.json")) == result
    assert json.loads(cluster.python(HISTORY, "lasting")) == expected
    assert cluster.python(PREDICT, "lasting").strip().splitlines()[-1] == "(2, 10)"


def _lose_workers(cluster: Cluster) -> None:
    """Each time both work, one is lost, a new group goes on without it, and grows when it is back."""
    first, second = cluster.containers("worker")
    (network,) = json.loads(docker("inspect", first))[0]["NetworkSettings"]["Networks"]

    def groups() -> list[int]:
        """Numbers of workers of the groups so far."""
        log = cluster.read("runs/lasting/logs/rank-0.log")
        return [int(number) for number in re.findall(r"rank 0 of (\d+)", log)]

    def lose(what: str, fault: Sequence[str], undo: Sequence[str]) -> None:
        grown = wait_for(lambda: groups()[-1:] == [2], 240, "a group of two workers")
        known = len(steps(cluster, "lasting"))
        wait_for(lambda: len(steps(cluster, "lasting")) >= known + 2, 90, "steps of two workers")
        before = len(groups())
        docker(*fault)
        seconds = wait_for(lambda: len(groups()) > before, 150, f"{what}: a new group")
        known = len(steps(cluster, "lasting"))
        seconds += wait_for(lambda: len(steps(cluster, "lasting")) > known, 90, f"{what}: a step")
        print(f"both at work after {grown:.0f} s; {what}: the next step after {seconds:.0f} s")
        docker(*undo)

    lose("one killed", ["kill", second], ["start", second])
    lose("one paused", ["pause", first], ["unpause", first])
    lose(
        "one cut off",
        ["network", "disconnect", network, second],
        ["network", "connect", network, second],
    )
