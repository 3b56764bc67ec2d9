"""Runs whose output is an object store: real servers of S3 and Google Cloud Storage, by HTTP."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from ray_nodes import OwnCluster, free_port, hfdist, own_cluster
from server import MlflowServer

from hfdist import api
from hfdist.errors import ConfigError, StorageError
from hfdist.rundir.locations import scratch
from hfdist.training.worker import evaluate_run

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("pictures")]

OUTPUT = "s3://runs/team"
JOB = """
name: digits
task: hfdist.tasks.digits:DigitsClassifier
steps: 6
optim: {cg_max_iter: 10}
batches: {gradient: 64}
checkpoint: {every: 1, keep: 2}
tracking: {enabled: false}
output: s3://runs/team
"""
LATE_TASK = """
from hfdist.errors import DataError
from hfdist.tasks.digits import DigitsClassifier

class Late(DigitsClassifier):
    calls = 0

    def loss(self, *arguments):
        self.calls += 1
        if self.calls == 80:
            raise DataError("the data ended")
        return super().loss(*arguments)
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A server with one bucket, named by the usual variables; scratch folders of this test's own."""
    import s3fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv(
        "AWS_EC2_METADATA_DISABLED", "true"
    )  # nothing waits for credentials of a cloud
    monkeypatch.setenv("HFDIST_SCRATCH", str(tmp_path / "scratch"))
    s3fs.S3FileSystem.clear_instance_cache()  # another server than the test before
    client = boto3.client("s3")
    client.create_bucket(Bucket="runs")
    yield client
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def names(bucket: Any) -> list[str]:
    listed = bucket.list_objects_v2(Bucket="runs", Prefix="team/").get("Contents", [])
    return [entry["Key"].removeprefix("team/") for entry in listed]


def text(bucket: Any, name: str) -> str:
    return bucket.get_object(Bucket="runs", Key=f"team/{name}")["Body"].read().decode()


def steps_of(bucket: Any, run_id: str) -> list[int]:
    lines = text(bucket, f"{run_id}/metrics.jsonl").splitlines()
    return [json.loads(line)["step"] for line in lines]


def another_machine() -> None:
    shutil.rmtree(scratch(OUTPUT))


def kill_in_the_middle(run_id: str, job: Path, change: str) -> int:
    """A run of 40 steps that is killed after some, and its machine lost; returns how many it told."""
    arguments = ["train", str(job), "--json", "--run-id", run_id, "steps=40", change]
    with hfdist(*arguments, environment={"OMP_NUM_THREADS": "1"}, cwd=job.parent) as program:
        program.wait_for(lambda p: len(p.events("step")) >= 4, 90)
        program.signal(signal.SIGKILL)
        program.end(30)
    another_machine()
    return len(program.events("step"))


def test_a_run_lies_in_the_bucket_and_goes_on_from_it(bucket: Any, job: Path) -> None:
    whole = api.train(job, run_id="whole")
    assert whole["run_dir"] == f"{OUTPUT}/whole"
    assert json.loads(text(bucket, "whole/result.json")) == whole
    assert {"whole/config.yaml", "whole/logs/rank-0.log", "whole/plots/convergence.png"} <= set(
        names(bucket)
    )
    api.train(job, ["steps=3"], run_id="half")
    another_machine()
    resumed = api.resume(f"{OUTPUT}/half", ["steps=6"])
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]
    assert steps_of(bucket, "half") == list(range(6))
    another_machine()
    assert evaluate_run(f"{OUTPUT}/half") == evaluate_run(f"{OUTPUT}/whole") | {"run_id": "half"}
    with pytest.raises(ConfigError, match="run half exists already: `hfdist resume s3://runs/team"):
        api.train(job, run_id="half")


def test_a_killed_run_goes_on_elsewhere(bucket: Any, job: Path) -> None:
    goal = kill_in_the_middle("killed", job, "launch.workers=2") + 4
    resumed = api.resume(f"{OUTPUT}/killed", ["launch.workers=1", f"steps={goal}"])
    assert resumed["status"] == "FINISHED"
    assert steps_of(bucket, "killed") == list(range(goal))
    # At most `keep` checkpoints and the best, and nothing of those that were never finished.
    assert len({name.split("/")[2] for name in names(bucket) if "/checkpoints/" in name}) <= 3


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnCluster]:
    """A head without workers, and two nodes: none sees what another writes into its scratch folder."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"]).returncode != 0:
        pytest.skip("folders of a process's own need root")
    folder = tmp_path_factory.mktemp("apart")
    (folder / "home").mkdir()
    with own_cluster(folder / "home") as cluster:
        cluster.start_head(cpus=0)
        for _ in range(2):
            cluster.join(1, without=folder / "scratch")
        cluster.environment["HFDIST_SCRATCH"] = str(folder / "scratch")
        yield cluster


@pytest.mark.slow
def test_google_cloud_storage(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through another client: a run that is resumed from another machine."""
    import gcsfs
    from gcp_storage_emulator.server import create_server

    port = free_port()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HFDIST_SCRATCH", str(tmp_path / "scratch"))
    gcsfs.GCSFileSystem.clear_instance_cache()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="runs")
    server.start()
    try:
        output = "gs://runs/team"
        whole = api.train(job, [f"output={output}"], run_id="whole")
        api.train(job, [f"output={output}", "steps=3"], run_id="half")
        shutil.rmtree(scratch(output))
        resumed = api.resume(f"{output}/half", ["steps=6"])
        assert resumed["parameters_sha256"] == whole["parameters_sha256"]
        stored = gcsfs.GCSFileSystem().find("runs/team/half")
        assert {"runs/team/half/result.json", "runs/team/half/metrics.jsonl"} <= set(stored)
        with pytest.raises(StorageError, match="output gs://nobody/team cannot be written"):
            api.train(job, ["output=gs://nobody/team"])
    finally:
        server.stop()
        gcsfs.GCSFileSystem.clear_instance_cache()


def on(cluster: OwnCluster, *arguments: str) -> Any:
    """`hfdist ARGUMENTS` on the workers of a cluster."""
    names = [name for name in os.environ if name.startswith("AWS_")]
    environment = cluster.environment | {name: os.environ[name] for name in names}
    more = ["launch.backend=ray", f"launch.address={cluster.address}"]
    return hfdist(*arguments, *more, environment=environment, cwd=cluster.home)


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """A server that is not there yet."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "mlflow").mkdir()
    server = MlflowServer(tmp_path / "mlflow")
    yield server
    server.kill()


def tracked(server: MlflowServer) -> Any:
    """The one MLflow run there is, and the steps of its loss."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("hfdist")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    return run, [metric.step for metric in history], files


@pytest.mark.slow
def test_a_record_reaches_a_server_that_comes_after_the_machine_has_gone(
    bucket: Any, tracking: MlflowServer, job: Path
) -> None:
    """Killed on one machine, finished on a second, delivered from a third."""
    change = f"tracking={{uri: '{tracking.uri}', system_metrics: false, finish_timeout: 0.5}}"
    kill_in_the_middle("late", job, change)
    result = api.resume(f"{OUTPUT}/late", ["steps=12"])
    assert result["status"] == "FINISHED"
    assert "late/undelivered.tar" in names(bucket)
    another_machine()
    with pytest.raises(StorageError, match="does not take the record of s3://runs/team/late"):
        api.sync(f"{OUTPUT}/late")
    tracking.start()
    another_machine()
    assert api.sync(f"{OUTPUT}/late") > 12
    run, steps, files = tracked(tracking)
    assert run.info.status == "FINISHED"
    assert steps == list(range(12))
    assert {"plots", "metrics.jsonl", "result.json", "config.yaml"} <= files
    assert run.outputs.model_outputs
    assert "late/undelivered.tar" not in names(bucket)
    assert api.sync(f"{OUTPUT}/late") == 0


@pytest.mark.ray
@pytest.mark.slow
def test_on_a_cluster(bucket: Any, job: Path, tmp_path: Path) -> None:
    arguments = ["train", str(job), "--json", "--run-id", "ray", "launch.workers=2", "steps=500"]
    more = ["launch.backend=ray", "launch.cpus_per_worker=0.5"]
    with hfdist(*arguments, *more, environment={"OMP_NUM_THREADS": "1"}, cwd=tmp_path) as program:
        program.wait_for(lambda p: len(p.events("step")) >= 3, 120)
        program.signal(signal.SIGINT)
        assert program.end(60) == 130, program.output
    result = json.loads(text(bucket, "ray/result.json"))
    assert result["status"] == "KILLED"
    assert steps_of(bucket, "ray") == list(range(result["steps"]))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_that_share_no_folder(bucket: Any, apart: OwnCluster, job: Path) -> None:
    arguments = ["train", str(job), "--json", "--run-id", "ray", "steps=500", "launch.workers=2"]
    with on(apart, *arguments) as program:
        program.wait_for(lambda p: len(p.events("step")) >= 3, 120)
        program.signal(signal.SIGINT)
        assert program.end(60) == 130, program.output
    stopped = json.loads(text(bucket, "ray/result.json"))
    assert stopped["status"] == "KILLED"
    assert steps_of(bucket, "ray") == list(range(stopped["steps"]))
    assert {"ray/logs/rank-0.log", "ray/logs/rank-1.log"} <= set(names(bucket))
    plot = bucket.head_object(Bucket="runs", Key="team/ray/plots/cg.png")["LastModified"]

    # The driver's own scratch folder is as it was before the run went on.
    steps = stopped["steps"] + 2
    with on(apart, "resume", f"{OUTPUT}/ray", "--json", f"steps={steps}") as program:
        assert program.end(120) == 0, program.output
    finished = json.loads(text(bucket, "ray/result.json"))
    assert (finished["status"], finished["steps"]) == ("FINISHED", steps)
    assert steps_of(bucket, "ray") == list(range(steps))
    assert bucket.head_object(Bucket="runs", Key="team/ray/plots/cg.png")["LastModified"] > plot
    assert text(bucket, "ray/logs/rank-1.log").count("process ") == 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mistake_that_shows_late_leaves_the_checkpoints(
    bucket: Any, apart: OwnCluster, job: Path, tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text(LATE_TASK)
    arguments = ["train", str(job), "--json", "--run-id", "late", "task=late.py:Late"]
    with on(apart, *arguments, "steps=500") as program:
        assert program.end(120) == 2, program.output
    assert "the data ended" in program.output
    result = json.loads(text(bucket, "late/result.json"))
    assert (result["status"], result["error"]) == ("FAILED", "DataError: the data ended")
    assert result["steps"] > 0
    assert any(name.startswith("late/checkpoints/") for name in names(bucket))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_submitted_job_brings_its_code_to_every_node(
    bucket: Any, apart: OwnCluster, job: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("from hfdist.tasks.digits import DigitsClassifier as Own\n")
    credentials = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    at = ("--address", apart.dashboard)
    arguments = ["submit", str(job), "--run-id", "sent", "--follow", *at]
    sent = apart(*arguments, "task=own.py:Own", "launch.workers=2", **credentials)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    result = json.loads(text(bucket, "sent/result.json"))
    assert (result["status"], result["world_size"]) == ("FINISHED", 2)
    more = apart("resume", "sent", "steps=8", "--follow", *at, **credentials)
    assert more.returncode == 0, more.stdout + more.stderr
    assert steps_of(bucket, "sent") == list(range(8))


@pytest.mark.parametrize(
    ("output", "before", "message"),
    [
        (
            "s3://nowhere/team",
            "",
            r"output s3://nowhere/team cannot be written \(.*check the addre",
        ),
        ("nothing://x/y", "", "output nothing://x/y/?.* cannot be used: Protocol not known"),
        ("s3://runs/team", "sys.modules['s3fs'] = None", r"cannot be used: .*s3fs.*hfdist\[s3\]"),
        (
            "s3://runs/team",
            "[os.environ.pop(n) for n in list(os.environ) if n.startswith('AWS_ACCESS')]",
            r"output s3://runs/team cannot be read \(.*check the address, and the credentials",
        ),
    ],
    ids=["no bucket", "no protocol", "no s3fs", "no credentials"],
)
def test_an_output_that_cannot_be_used_is_one_message(
    bucket: Any, job: Path, output: str, before: str, message: str
) -> None:
    program = f"import os, sys\n{before}\nfrom hfdist.cli import main\nmain()"
    answer = subprocess.run(
        [sys.executable, "-c", program, "train", str(job), f"output={output}", "--run-id", "bad"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert answer.returncode == 2, answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert re.search(message, answer.stderr), answer.stderr
    assert not (scratch(output) / "bad").exists()


def test_a_store_that_refuses_is_one_message(bucket: Any, job: Path) -> None:
    """As one does whose policy lets this user read, and no more."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(404 if self.command == "HEAD" else 403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
            with pytest.raises(StorageError, match=r"s3://runs/team cannot be .*the credentials"):
                api.train(job, run_id="refused")
        server.shutdown()


def test_no_run_at_an_address(bucket: Any) -> None:
    with pytest.raises(ConfigError, match="s3://runs/team/missing is no run"):
        api.resume(f"{OUTPUT}/missing")


def test_a_mistake_in_the_job_leaves_nothing(bucket: Any, job: Path) -> None:
    with pytest.raises(Exception, match="99999"):
        api.train(job, ["batches.gradient=99999"], run_id="mistake")
    assert names(bucket) == []


def a_group(job: Path, *arguments: str) -> list[tuple[int, str]]:
    """`hfdist train JOB` as torchrun starts it on two ranks: their exit codes and outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        programs = [
            stack.enter_context(
                hfdist(
                    *("train", str(job), "--quiet", *arguments),
                    environment={**common, "RANK": rank, "LOCAL_RANK": rank},
                    cwd=job.parent,
                )
            )
            for rank in "01"
        ]
        return [(program.end(90), program.output) for program in programs]


@pytest.mark.ranks
@pytest.mark.slow
def test_two_workers_however_they_are_started(bucket: Any, job: Path) -> None:
    changes = ["steps=3", "launch.threads_per_worker=1"]
    local = api.train(job, [*changes, "launch.workers=2"], run_id="local")
    ended = a_group(job, *changes, "--run-id", "group")
    assert [code for code, _ in ended] == [0, 0], ended
    group = json.loads(text(bucket, "group/result.json"))
    assert group["world_size"] == local["world_size"] == 2
    assert group["parameters_sha256"] == local["parameters_sha256"]
    assert steps_of(bucket, "group") == steps_of(bucket, "local") == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.ranks
def test_every_rank_of_a_group_says_that_there_is_no_bucket(bucket: Any, job: Path) -> None:
    output = "s3://nowhere/team"
    for code, said in a_group(job, f"output={output}", "--run-id", "bad"):
        assert code == 2, said
        assert said.count("error:") == 1, said
        assert f"output {output} cannot be written" in said, said
    assert not (scratch(output) / "bad").exists()
