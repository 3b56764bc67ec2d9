"""Runs whose output is an object store: a real S3 server, by HTTP."""

from __future__ import annotations

import json
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from ray_nodes import hfdist, nodes

from hfdist import api
from hfdist.addresses import scratch
from hfdist.errors import ConfigError, StorageError
from hfdist.worker import evaluate_run

pytestmark = pytest.mark.timeout(240)

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


def test_a_killed_run_goes_on_elsewhere(bucket: Any, job: Path, tmp_path: Path) -> None:
    arguments = ["train", str(job), "--json", "--run-id", "killed", "launch.workers=2", "steps=40"]
    with hfdist(*arguments, environment={"OMP_NUM_THREADS": "1"}, cwd=tmp_path) as program:
        program.wait_for(lambda p: len(p.events("step")) >= 4, 90)
        program.signal(signal.SIGKILL)
        program.end(30)
    another_machine()
    resumed = api.resume(f"{OUTPUT}/killed", ["launch.workers=1"])
    assert resumed["status"] == "FINISHED"
    assert steps_of(bucket, "killed") == list(range(40))
    # At most `keep` checkpoints and the best, and nothing of those that were never finished.
    assert len({name.split("/")[2] for name in names(bucket) if "/checkpoints/" in name}) <= 3


@pytest.mark.ray
def test_nodes_that_share_no_folder(bucket: Any, job: Path, tmp_path: Path) -> None:
    with nodes(tmp_path, {"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        arguments = [
            *("train", str(job), "--json", "--run-id", "ray", "launch.workers=2", "steps=500"),
            *("launch.backend=ray", f"launch.address={cluster.address}"),
        ]
        with hfdist(*arguments, environment=cluster.environment, cwd=tmp_path) as program:
            program.wait_for(lambda p: len(p.events("step")) >= 3, 120)
            program.signal(signal.SIGINT)
            assert program.end(60) == 130, program.output
    result = json.loads(text(bucket, "ray/result.json"))
    assert result["status"] == "KILLED"
    assert steps_of(bucket, "ray") == list(range(result["steps"]))
    another_machine()
    resumed = api.resume(
        f"{OUTPUT}/ray",
        [f"steps={result['steps'] + 1}", "launch.backend=local", "launch.workers=1"],
    )
    assert resumed["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("s3://nowhere/team", r"output s3://nowhere/team cannot be written \(.*check the address"),
        ("nothing://x/y", "output nothing://x/y/?.* cannot be used: Protocol not known"),
    ],
)
def test_an_output_that_cannot_be_used_is_one_message(
    bucket: Any, job: Path, output: str, message: str
) -> None:
    with pytest.raises(StorageError, match=message):
        api.train(job, [f"output={output}"], run_id="nowhere")
    assert not (scratch(output) / "nowhere").exists()


def test_no_run_at_an_address(bucket: Any) -> None:
    with pytest.raises(ConfigError, match="s3://runs/team/missing is no run"):
        api.resume(f"{OUTPUT}/missing")


def test_a_mistake_in_the_job_leaves_nothing(bucket: Any, job: Path) -> None:
    with pytest.raises(Exception, match="99999"):
        api.train(job, ["batches.gradient=99999"], run_id="mistake")
    assert names(bucket) == []
