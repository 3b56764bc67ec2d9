"""Jobs of a cluster that `hfdist cluster` has started: submitted, followed, stopped, gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_nodes import ROOT, forget_cluster, free_port, left_of, own_cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]  # beside other tests

SECRET = "tracking.tags.api_token=hidden-7"
Command = Callable[..., subprocess.CompletedProcess[str]]

TASK = """
import time
from hfdist.tasks.digits import DigitsClassifier

class Slow(DigitsClassifier):
    def loss(self, *arguments):
        time.sleep(0.02)
        return super().loss(*arguments)
"""
JOB = """
name: demo
task: task.py:Slow
steps: 4
launch: {workers: 2, cpus_per_worker: 0.5}
optim: {solver: cg, preconditioner: none}
checkpoint: {every: 1}
tracking: {system_metrics: false, log_model: false}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def command(home: Path) -> Command:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_TRACKING_PASSWORD": "hidden-8"}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hfdist", *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=home,
            env=environment | more,
        )

    return run


@pytest.fixture(scope="module")
def dashboard(command: Command, home: Path) -> Iterator[str]:
    port, dashboard_port = free_port(), free_port()
    started = command(
        *("cluster", "start-head", "--port", str(port), "--cpus", "1"),
        *("--dashboard-port", str(dashboard_port)),
    )
    try:
        assert started.returncode == 0, started.stderr
        joined = command("cluster", "join", f"127.0.0.1:{port}", "--cpus", "1")
        assert joined.returncode == 0, joined.stderr
        yield f"http://127.0.0.1:{dashboard_port}"
    finally:
        stopped = command("cluster", "stop")
        assert stopped.stdout.count("stopped") == 2, stopped.stderr
        forget_cluster(f"127.0.0.1:{port}")
    assert left_of(f"127.0.0.1:{port}") == []


def cmdline(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "job.yaml").write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    return tmp_path


def test_the_token_is_nowhere_but_in_its_file(command: Command, dashboard: str, home: Path) -> None:
    path = home / ".ray" / "auth_token"
    token = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) >= 32
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if token in cmdline(p)]
    refused = command("jobs", "list", "--address", dashboard, RAY_AUTH_TOKEN_PATH="/dev/null")
    assert refused.returncode == 2
    wrong = home / "wrong"
    wrong.write_text("0" * len(token))
    refused = command(
        *("jobs", "list", "--address", dashboard),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(wrong),
    )
    assert refused.returncode == 2
    assert "does not accept this user" in refused.stderr
    assert token not in refused.stderr


@pytest.mark.smoke
def test_a_job_from_submission_to_its_continuation(
    command: Command, dashboard: str, project: Path
) -> None:
    at = ("--address", dashboard)
    began = time.monotonic()
    answer = command(
        *("submit", str(project / "job.yaml"), "steps=200", "launch.workers=1", SECRET),
        *("--run-id", "one", *at, "--json"),
    )
    assert answer.returncode == 0, answer.stderr
    submitted = json.loads(answer.stdout)
    assert submitted["job_id"] == submitted["run_id"] == "one"
    run_dir = Path(submitted["run_dir"])
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() - began < 600, command("jobs", "logs", "one", *at).stdout
        time.sleep(0.2)
    seconds = time.monotonic() - began
    print(f"from submission to the second step: {seconds:.1f} s")
    again = command("resume", "one", *at)
    assert again.returncode == 2
    assert "goes on as job one" in again.stderr
    stopped = command("jobs", "stop", "one", *at, "--json")
    assert json.loads(stopped.stdout)["status"] == "STOPPED"
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "KILLED"
    assert 2 <= result["steps"] < 200
    more = result["steps"] + 2
    resumed = command("resume", "one", f"steps={more}", SECRET, *at, "--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"going on at step {result['steps']} of {more}" in resumed.stdout
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(more))

    jobs = {job["id"]: job for job in json.loads(command("jobs", "list", *at, "--json").stdout)}
    assert jobs["one"]["status"] == "STOPPED"
    assert jobs["one-r2"]["status"] == "SUCCEEDED"
    assert jobs["one-r2"]["run_id"] == "one"
    assert jobs["one-r2"]["task"] == "task.py:Slow"
    assert jobs["one-r2"]["steps"] == more
    shown = json.dumps(jobs) + command("jobs", "logs", "one", *at).stdout
    assert "hidden-" not in shown
    assert command("jobs", "delete", "one-r2", *at).returncode == 0
    left = [job["id"] for job in json.loads(command("jobs", "list", *at, "--json").stdout)]
    assert left == ["one"]


@pytest.mark.slow
def test_jobs_that_wait_say_their_place_and_why_and_go_by_priority(
    command: Command, dashboard: str, project: Path
) -> None:
    at = ("--address", dashboard)
    changes = ("steps=2000", "launch.cpus_per_worker=1", "tracking.enabled=false")

    def submitted(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return command(
            "submit", str(project / "job.yaml"), *changes, "--run-id", name, *options, *at
        )

    def submit(name: str, *options: str) -> None:
        answer = submitted(name, *options)
        assert answer.returncode == 0, answer.stderr

    def queue(condition: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, dict[str, Any]]:
        deadline = time.monotonic() + 400
        while True:
            answer = command("jobs", "list", "--queue", "--json", *at)
            found = {job["id"]: job for job in json.loads(answer.stdout)}
            if condition(found):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(1.0)

    with ThreadPoolExecutor(2) as pool:  # of two at a time one is told that the other was first
        twice = pool.map(submitted, ["first", "first"], ["--label", "--label"], ["q", "q"])
    refused, accepted = sorted(twice, key=lambda answer: -answer.returncode)
    assert (refused.returncode, accepted.returncode) == (2, 0), refused.stdout + refused.stderr
    assert "the cluster has a job first already: choose another --run-id" in refused.stderr
    queue(lambda jobs: jobs["first"]["state"] == "running")
    submit("second")
    submit("third", "--priority", "5")
    submit("fourth", "--priority", "9", "--label", "q", "--at-most", "1")
    reasons = {"second": "before it", "third": "CPU", "fourth": "at most 1 jobs of label q"}
    found = queue(lambda jobs: all(words in jobs[n]["reason"] for n, words in reasons.items()))
    assert list(found) == ["first", "fourth", "third", "second"]
    assert [job["place"] for job in found.values()] == [None, 1, 2, 3]
    assert "third (priority 5) is before it" in found["second"]["reason"]
    shown = command("jobs", "list", "--queue", *at).stdout
    assert "second: place 3 of 3 in the queue: third (priority 5) is before it" in shown
    assert "place 3 of 3" in command("jobs", "status", "second", *at).stdout
    assert "place 3 of 3" in command("jobs", "logs", "second", *at).stdout
    refused = command("jobs", "delete", "second", *at)
    assert refused.returncode == 2
    assert "job second is waiting in the queue: `hfdist jobs stop second" in refused.stderr
    for name in ("fourth", "first"):  # one that waits, and the one that runs
        stopped = command("jobs", "stop", name, *at, "--json")
        assert json.loads(stopped.stdout)["status"] == "STOPPED"
    found = queue(lambda jobs: jobs["third"]["state"] == "running")
    assert found["second"]["state"] == "waiting"
    for name in ("second", "third"):
        command("jobs", "stop", name, *at)
    assert queue(lambda jobs: not jobs) == {}
    assert not (project / "runs" / "second" / "metrics.jsonl").exists()


def test_a_mistake_in_a_job(command: Command, dashboard: str, project: Path) -> None:
    at = ("--address", dashboard)
    job = str(project / "job.yaml")
    failed = command("submit", job, "--run-id", "bad", "task=task.py:Nothing", *at, "--follow")
    assert failed.returncode == 2
    assert "has no class 'Nothing'" in failed.stdout
    assert not (project / "runs" / "bad").exists()
    unknown = command("jobs", "status", "nobody", *at)
    assert (unknown.returncode, "has no job nobody" in unknown.stderr) == (2, True)


def test_names_are_checked_before_anything_is_sent(
    command: Command, dashboard: str, project: Path
) -> None:
    for name in ("../x", ""):
        refused = command(
            *("submit", str(project / "job.yaml"), "--address", dashboard, f"--run-id={name}")
        )
        assert refused.returncode == 2
        assert "run id" in refused.stderr
    listed = json.loads(command("jobs", "list", "--address", dashboard, "--json").stdout)
    assert not [job for job in listed if job["id"] in ("../x", "a b/e")]


def test_jobs_that_ray_itself_cannot_name_are_deleted(
    command: Command, dashboard: str, home: Path
) -> None:
    """Such as older versions have left: they wait for a driver that never comes."""
    ghosts = ("../x", "a b/e")
    code = (
        "import sys\n"
        "from hfdist.launch.ray.jobs import jobs_of\n"
        "for name in sys.argv[2:]:\n"
        "    try:\n"
        "        with jobs_of(sys.argv[1]) as client:\n"
        "            client.submit_job(entrypoint='true', submission_id=name)\n"
        "    except Exception as error:\n"
        "        print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    said = subprocess.run(
        [sys.executable, "-c", code, dashboard, *ghosts],
        env=environment | {"HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    ).stdout
    for line in said.splitlines():
        assert len(line.partition(" says: ")[2]) > 10, said  # never empty, nor a stop
    at = ("--address", dashboard)
    listed = json.loads(command("jobs", "list", *at, "--json").stdout)
    assert set(ghosts) <= {job["id"] for job in listed}
    assert "id:         ../x" in command("jobs", "status", "../x", *at).stdout
    assert "never began" in command("jobs", "stop", "../x", *at).stderr
    for name in ghosts:
        deleted = command("jobs", "delete", name, *at)
        assert deleted.returncode == 0, deleted.stderr
    listed = json.loads(command("jobs", "list", *at, "--json").stdout)
    assert not [job for job in listed if job["id"] in ghosts or job["id"].startswith("forget")]
    missing = command("jobs", "delete", "../y", *at)
    assert missing.returncode == 2
    assert "has no job ../y" in missing.stderr


def test_a_sweep_with_a_wrong_token_says_so(
    command: Command, dashboard: str, project: Path, home: Path
) -> None:
    wrong = home / "wrong"
    wrong.write_text("0" * 64)
    refused = command(
        *(
            "sweep",
            str(project / "job.yaml"),
            "steps=1,2",
            f"output={home}/swept",
            "--address",
            "auto",
        ),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(wrong),
    )
    assert refused.returncode == 2
    assert "does not accept this user" in refused.stderr


def test_no_dashboard(command: Command) -> None:
    answer = command("jobs", "list", "--address", "http://127.0.0.1:1")
    assert answer.returncode == 2
    assert "no Ray dashboard answers" in answer.stderr


def test_a_program_finds_the_cluster_that_was_started_here(
    command: Command, dashboard: str, project: Path
) -> None:
    auto = ("launch.backend=ray", "launch.address=auto", "launch.workers=1", "steps=1")
    trained = command("train", str(project / "job.yaml"), "--json", *auto)
    assert trained.returncode == 0, trained.stderr
    assert '"status": "FINISHED"' in trained.stdout


@pytest.mark.slow
def test_two_users_of_one_machine_have_a_cluster_each(project: Path, tmp_path: Path) -> None:
    homes = [tmp_path / "ann", tmp_path / "bob"]
    for home in homes:
        home.mkdir()
    with own_cluster(homes[0]) as ann, own_cluster(homes[1]) as bob:
        for cluster in (ann, bob):
            cluster.start_head(1)
        changes = ["steps=1", "launch.workers=1"]
        for cluster in (ann, bob):
            job = str(project / "job.yaml")
            submitted = cluster("submit", job, "--address", cluster.dashboard, *changes)
            assert submitted.returncode == 0, submitted.stderr
        deadline = time.monotonic() + 600
        found: list[str] = []
        while len(found) < 2 or "RUNNING" in found or "PENDING" in found:
            assert time.monotonic() < deadline, found
            time.sleep(2.0)
            lists = [c("jobs", "list", "--json", "--address", c.dashboard) for c in (ann, bob)]
            found = [job["status"] for shown in lists for job in json.loads(shown.stdout)]
        assert found == ["SUCCEEDED", "SUCCEEDED"]
