"""What a run's page in MLflow is made of, told to a real server by a real run."""

from __future__ import annotations

import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from server import MlflowServer

import hfdist
from hfdist import api

pytestmark = [pytest.mark.timeout(600)]

JOB = """
name: page
task: own.py:Own
steps: 3
optim: {{cg_max_iter: 3}}
tracking: {{uri: "{uri}", experiment: "{experiment}", system_metrics: false, log_model: false}}
output: {folder}/runs
"""
TASK = """
from hfdist.tasks.digits import DigitsClassifier

class Own(DigitsClassifier):
    pass
"""


@pytest.fixture
def client(server) -> MlflowClient:
    return MlflowClient(server.uri)


@pytest.fixture
def job(tmp_path: Path, server: MlflowServer, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "own.py").write_text(TASK)
    path = tmp_path / "job.yaml"
    experiment = request.node.name
    path.write_text(JOB.format(uri=server.uri, folder=tmp_path, experiment=experiment))
    return path


def kind(client: MlflowClient, name: str) -> Any:
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return experiment.tags.get("mlflow.experimentKind")


def git(folder: Path, *arguments: str) -> str:
    words = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.usefixtures("pictures")
def test_the_page_shows_what_the_run_was(
    server: MlflowServer, client: MlflowClient, job: Path, request: pytest.FixtureRequest
) -> None:
    result = hfdist.train(job, ["optim.damping=3"])
    assert kind(client, request.node.name) == "custom_model_development"
    run = client.get_run(result["mlflow_run_id"])
    note = run.data.tags["mlflow.note.content"]
    for words in ("FINISHED", "3 of 3 steps", "Own", "optim.damping=3", result["run_dir"]):
        assert words in note
    # Every link and picture of the description is there.
    addresses = [part.split(")")[0] for part in note.split("](")[1:]]
    assert len(addresses) == 1 + 3 + 3
    for address in addresses:
        with urllib.request.urlopen(f"{server.uri}/{address}") as answer:
            assert answer.read(), address
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert addresses[0] == f"{page}/model-metrics?workflowType=machine_learning"
    assert result["tracking_url"] == f"{server.uri}/{page}?workflowType=machine_learning"
    assert run.data.tags["mlflow.loggedImages"] == "True"
    pictures = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    for name in ("convergence", "cg", "damping"):
        full = [p for p in pictures if p.startswith(f"{name}+step+3+") and p.endswith(".png")]
        assert len(full) == 1
    assert len(run.data.tags["hfdist.source.sha256"]) == 64  # no git here


@pytest.mark.usefixtures("pictures")
@pytest.mark.slow
def test_a_resumed_run_has_each_picture_once_a_step_and_keeps_what_people_wrote(
    client: MlflowClient, job: Path
) -> None:
    result = hfdist.train(job)
    run_id = result["mlflow_run_id"]
    api.resume(result["run_dir"])
    api.resume(result["run_dir"], ["steps=4"])
    assert "4 of 4 steps" in client.get_run(run_id).data.tags["mlflow.note.content"]
    names = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    steps = [n.split("+")[2] for n in names if n.startswith("cg+") and n.endswith(".png")]
    assert sorted(steps) == ["3", "4"]
    client.set_tag(run_id, "mlflow.note.content", "the good one")
    api.resume(result["run_dir"], ["steps=5"])
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "the good one"


def test_a_users_own_description_and_kind_stay(
    client: MlflowClient, job: Path, request: pytest.FixtureRequest
) -> None:
    client.create_experiment(request.node.name, tags={"mlflow.experimentKind": "genai_development"})
    override = 'tracking.tags={"mlflow.note.content": "mine"}'
    result = hfdist.train(job, [override])
    tags = client.get_run(result["mlflow_run_id"]).data.tags
    assert tags["mlflow.note.content"] == "mine"
    assert kind(client, request.node.name) == "genai_development"


def test_an_experiment_that_was_there_is_marked(
    client: MlflowClient, job: Path, request: pytest.FixtureRequest
) -> None:
    client.create_experiment(request.node.name)
    hfdist.train(job, ["steps=1"])
    assert kind(client, request.node.name) == "custom_model_development"


@pytest.mark.slow
def test_the_source_is_the_commit_and_what_differs_from_it(
    client: MlflowClient, job: Path, tmp_path: Path
) -> None:
    def tags() -> dict[str, str]:
        return client.get_run(hfdist.train(job, ["steps=1"])["mlflow_run_id"]).data.tags

    git(tmp_path, "init", "-q", "-b", "trunk")
    git(tmp_path, "remote", "add", "origin", "https://ann:hunter2@example.org/own.git")
    git(tmp_path, "add", "own.py", "job.yaml")
    git(tmp_path, "commit", "-qm", "first")
    clean = tags()
    assert clean["mlflow.source.git.commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert clean["mlflow.source.git.branch"] == "trunk"
    assert clean["mlflow.source.git.repoURL"] == "https://example.org/own.git"
    assert clean["mlflow.source.git.dirty"] == "false"
    assert "hfdist.source.diff_sha256" not in clean
    (tmp_path / "own.py").write_text(TASK + "    # changed\n")
    changed = tags()
    assert changed["mlflow.source.git.dirty"] == "true"
    assert changed["hfdist.source.diff_sha256"] == tags()["hfdist.source.diff_sha256"]
    (tmp_path / "helper.py").write_text("new = 1\n")
    assert tags()["hfdist.source.diff_sha256"] != changed["hfdist.source.diff_sha256"]
