"""Runs at addresses that need no server: memory:// and file://."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from hfdist import api
from hfdist.config.job import from_dict
from hfdist.errors import ConfigError
from hfdist.rundir.locations import normal, scratch
from hfdist.training.worker import evaluate_run, local_folder

pytestmark = pytest.mark.timeout(600)

OUTPUT = "memory://runs/team"
JOB = """
name: digits
task: hfdist.tasks.digits:DigitsClassifier
steps: 4
optim: {cg_max_iter: 5}
batches: {gradient: 64}
checkpoint: {every: 1}
tracking: {enabled: false}
output: memory://runs/team
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A job, an empty memory, and scratch folders of this test's own."""
    monkeypatch.setenv("HFDIST_SCRATCH", str(tmp_path / "scratch"))
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    yield path
    forget("")


def forget(name: str) -> None:
    memory = fsspec.filesystem("memory")
    path = f"/runs/team/{name}".rstrip("/")
    if memory.exists(path):
        memory.rm(path, recursive=True)


def steps(text: str) -> list[int]:
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_a_run_goes_on_from_its_address_alone(job: Path) -> None:
    whole = api.train(job, run_id="whole")
    api.train(job, ["steps=2"], run_id="half")
    shutil.rmtree(scratch(OUTPUT))
    resumed = api.resume(f"{OUTPUT}/half/", ["steps=4"])
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]
    memory = fsspec.filesystem("memory")
    assert steps(memory.cat_file("/runs/team/half/metrics.jsonl").decode()) == [0, 1, 2, 3]
    assert evaluate_run(f"{OUTPUT}/half") == evaluate_run(f"{OUTPUT}/whole") | {"run_id": "half"}
    assert not [name for name in memory.ls("/runs/team", detail=False) if ".probe" in name]


def test_a_look_at_a_run_that_goes_on_here_leaves_its_record(job: Path) -> None:
    api.train(job, run_id="run")
    record = scratch(OUTPUT) / "run" / "metrics.jsonl"
    pushed = record.read_text()
    # A step since the last checkpoint.
    record.write_text(pushed + '{"step":4}\n')
    evaluate_run(f"{OUTPUT}/run")
    assert steps(record.read_text()) == [0, 1, 2, 3, 4]
    # The run has gone on elsewhere since: what is here is old.
    record.write_text('{"step":0}\n{"step":1}\n')
    local_folder(f"{OUTPUT}/run")
    assert record.read_text() == pushed


def test_a_run_that_was_removed_from_its_address_is_forgotten_here(job: Path) -> None:
    api.train(job, ["seed=1"], run_id="run")
    forget("run")
    api.train(job, ["seed=2", "steps=2"], run_id="run")
    memory = fsspec.filesystem("memory")
    assert b"seed: 2" in memory.cat_file("/runs/team/run/config.yaml")
    assert steps(memory.cat_file("/runs/team/run/metrics.jsonl").decode()) == [0, 1]


def test_a_file_address_is_a_folder(job: Path, tmp_path: Path) -> None:
    result = api.train(job, [f"output=file://{tmp_path}/runs", "steps=1"], run_id="run")
    assert result["run_dir"] == str(tmp_path / "runs" / "run")
    assert evaluate_run(f"file://{tmp_path}/runs/run")["step"] == 1


@pytest.mark.parametrize(
    ("output", "form"),
    [
        ("s3://bucket/", "s3://bucket"),
        ("gs://bucket/a/b//", "gs://bucket/a/b"),
        ("file:///data/runs", "/data/runs"),
        ("runs/", "runs/"),
    ],
)
def test_an_output_has_one_form(output: str, form: str) -> None:
    assert normal(output) == form


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": "s3://"}, "^job: output is s3://: name a bucket, like s3://BUCKET/PREFIX$"),
        ({"output": "file://runs"}, "^job: output is file://runs: write file:///FOLDER, or"),
        (
            {"output": "memory://runs", "launch": {"workers": 2}},
            "^job: output is memory://runs, which other processes do not see: choose a folder or",
        ),
        ({"output": "memory://runs", "launch": {"max_failures": 1}}, "launch.max_failures=0"),
    ],
)
def test_an_output_that_cannot_work_is_one_message(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict({"task": "hfdist.tasks.digits:DigitsClassifier", **values}, "job")


@pytest.mark.parametrize("home", ["s3://bucket", "s3://bucket/", "s3://", "memory://runs/missing"])
def test_no_run_at_an_address(job: Path, home: str) -> None:
    for act in (api.resume, evaluate_run):
        with pytest.raises(ConfigError, match=r"is no run|name a bucket"):
            act(home)
    folder = job.parent / "scratch"
    assert not folder.exists() or not list(folder.rglob("*"))
