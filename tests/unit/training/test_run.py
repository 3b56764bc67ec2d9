"""Runs from beginning to end in this process: record, resume, results, bad input."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rules import CG_OVERRIDES

import hfdist
from hfdist import api
from hfdist.checkpoint import parameters_sha256
from hfdist.config.job import load_config, to_yaml
from hfdist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StorageError,
    TaskError,
    UserError,
)
from hfdist.training.worker import build, evaluate_run

TASK = """
import torch
from torch import nn
from hfdist import Task
from hfdist.tasks.array_data import ArrayData

class Own(Task):
    def __init__(self, examples=40, width=6, dropout=0.2):
        self.width, self.dropout = width, dropout
        g = torch.Generator().manual_seed(3)
        self.x = torch.randn(examples, 4, generator=g)
        self.y = self.x.sin().sum(1, keepdim=True)
    def model(self):
        return nn.Sequential(
            nn.Linear(4, self.width), nn.BatchNorm1d(self.width), nn.Tanh(),
            nn.Dropout(self.dropout), nn.Linear(self.width, 1))
    def loss(self, outputs, batch):
        return nn.functional.mse_loss(outputs, batch[1])
    def train_data(self):
        return ArrayData(self.x, self.y)
    def eval_data(self):
        return ArrayData(self.x[:10], self.y[:10])

class VectorLoss(Own):
    def loss(self, outputs, batch):
        return (outputs - batch[1]).square()

class Detached(Own):
    def loss(self, outputs, batch):
        return super().loss(outputs.detach(), batch)

class Broken(Own):
    def forward(self, model, batch):
        return model(batch[0][:, :3])

class Empty(Own):
    def __init__(self):
        super().__init__(examples=0)

class Frozen(Own):
    def model(self):
        return super().model().requires_grad_(False)

class Overflowing(Own):
    def loss(self, outputs, batch):
        return outputs.square().mean() + float("inf")

class NoExample(Own):
    def example_inputs(self, batch):
        raise KeyError("inputs")

class NaN(Own):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch) * float("nan")

class Inf(Own):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch) + float("inf")

class Uphill(Own):
    def loss(self, outputs, batch):
        # A gradient that points the wrong way: no step lowers the loss.
        loss = super().loss(outputs, batch)
        return 2 * loss.detach() - loss

class Bottom(Own):
    def loss(self, outputs, batch):
        return 0.0 * super().loss(outputs, batch)

class NoModel(Own):
    def model(self):
        return "a model"
"""

JOB: dict[str, Any] = {
    "name": "own",
    "task": "task.py:Own",
    "steps": 10,
    "batches": {"gradient": 24, "curvature": 12, "line_search": 16},
    "optim": {"cg_max_iter": 8},
    "checkpoint": {"every": 2},
    "tracking": {"enabled": False},
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file with a task beside it."""
    (tmp_path / "task.py").write_text(TASK)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"output": str(tmp_path / "runs")}))
    return path


def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["run_dir"]) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.usefixtures("pictures")
def test_a_run_leaves_what_it_should(job: Path) -> None:
    result = hfdist.train(job)
    run_dir = Path(result["run_dir"])
    assert result["status"] == "FINISHED"
    assert result["steps"] == 10
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert [r["step"] for r in records(result)] == list(range(10))
    assert {p.name for p in (run_dir / "plots").iterdir()} == {
        "convergence.png",
        "cg.png",
        "damping.png",
    }
    assert sum(r["cg_iterations"] for r in records(result)) == result["cg_iterations"]
    assert result["final_loss"] == records(result)[-1]["final_loss"]
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert saved["optim"]["cg_max_iter"] == 8
    assert saved["evaluate"]["every"] == 1  # defaults are resolved, too
    assert evaluate_run(run_dir)["loss"] == pytest.approx(result["eval_loss"])


@pytest.mark.parametrize(
    ("first", "rules"),
    [
        (5, []),
        pytest.param(6, [], marks=pytest.mark.slow),
        (5, CG_OVERRIDES),
        (6, ["optim.preconditioner_refresh=4"]),
        (6, ["optim.preconditioner=ekfac", "optim.solver=krylov"]),
        (8, ["batches.gradient=null", "batches.line_search=null", "optim.solver=krylov"]),
    ],
    ids=["5", "6", "5-cg", "6-refresh", "6-ekfac", "8-secants"],
)
def test_resume_is_exact(job: Path, first: int, rules: list[str]) -> None:
    whole = hfdist.train(job, rules)
    part = hfdist.train(job, [*rules, f"steps={first}"])
    assert part["steps"] == first
    rest = api.resume(part["run_dir"], ["steps=10"])
    assert rest["parameters_sha256"] == whole["parameters_sha256"]
    keys = ("step", "loss", "final_loss", "damping", "cg_iterations", "alpha", "eval/loss")
    assert [[r[k] for k in keys] for r in records(rest)] == [
        [r[k] for k in keys] for r in records(whole)
    ]
    assert rest["cg_iterations"] == whole["cg_iterations"]


def test_resume_of_a_finished_run_changes_nothing(job: Path) -> None:
    whole = hfdist.train(job)
    again = api.resume(whole["run_dir"])
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    assert again["steps"] == 10


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    job: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = hfdist.train(job)
    part = hfdist.train(job, ["steps=7"])
    newest = sorted((Path(part["run_dir"]) / "checkpoints").iterdir())[-1]
    file = newest / "tensors-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    rest = api.resume(part["run_dir"], ["steps=10"])
    assert "damaged" in caplog.text
    assert newest.name in caplog.text
    assert rest["parameters_sha256"] == whole["parameters_sha256"]


def test_last_and_best_checkpoints_are_kept(job: Path) -> None:
    result = hfdist.train(job, ["checkpoint.every=1", "checkpoint.keep=2"])
    names = sorted(p.name for p in (Path(result["run_dir"]) / "checkpoints").iterdir())
    steps = [int(name[-8:]) for name in names]
    losses = {r["step"] + 1: r["eval/loss"] for r in records(result)}
    best = min(losses, key=lambda step: losses[step])
    assert steps == sorted({9, 10, best})


def test_random_numbers_of_the_program_do_not_matter(job: Path) -> None:
    one = hfdist.train(job)
    torch.manual_seed(12345)
    torch.rand(7)
    two = hfdist.train(job)
    assert one["parameters_sha256"] == two["parameters_sha256"]
    other = hfdist.train(job, ["seed=1"])
    assert other["parameters_sha256"] != one["parameters_sha256"]


def test_digest_is_that_of_the_saved_parameters(job: Path) -> None:
    result = hfdist.train(job, ["steps=0"])
    config = hfdist.RunConfig.from_run(Path(result["run_dir"]))
    _, model = build(config, torch.device("cpu"))
    assert result["parameters_sha256"] == parameters_sha256(dict(model.named_parameters()))


@pytest.mark.parametrize(
    "change",
    [
        [],
        CG_OVERRIDES,
        ["optim.preconditioner=none"],
        ["optim.preconditioner=empirical_fisher"],
        ["optim.curvature_opt=hessian"],
        ["batches.microbatch=8"],
        ["batches.growth=1.2"],
        ["dtype=float64"],
        ["optim.preset=seed"],
    ],
    ids=lambda change: change[0] if change else "default",
)
def test_rules_train(job: Path, change: list[str]) -> None:
    easy = ["steps=25", "task_args.dropout=0", "batches.gradient=null", "batches.line_search=null"]
    result = hfdist.train(job, [*easy, *change])
    assert result["final_loss"] < 0.5 * records(result)[0]["loss"]


# -- extras


@pytest.mark.usefixtures("pictures")
def test_an_infinite_loss_at_every_step_ends_with_a_result(job: Path) -> None:
    with contextlib.suppress(UserError):
        hfdist.train(job, ["task=task.py:Overflowing", "steps=3"], run_id="inf")
    run_dir = job.parent / "runs" / "inf"
    assert json.loads((run_dir / "result.json").read_text())["steps"] == 3
    assert len(list((run_dir / "plots").glob("*.png"))) == 3


TRACKED = ["tracking.enabled=true", "tracking.system_metrics=false"]


def models_of(run_dir: Path, mlflow_run_id: str) -> list[Any]:
    """The models of a run in its MLflow store."""
    from mlflow import MlflowClient

    outputs = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db").get_run(mlflow_run_id).outputs
    return [] if outputs is None else outputs.model_outputs


def test_a_run_that_resumes_with_no_step_left_records_its_model_once(
    job: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = hfdist.train(job, [*TRACKED, "steps=3", "tracking.log_model=false"])
    for _ in range(2):  # as after a kill between the last step and the end
        again = api.resume(result["run_dir"], ["tracking.log_model=true"])
    assert "not recorded" not in caplog.text
    assert again["mlflow_run_id"] == result["mlflow_run_id"]
    assert len(models_of(Path(again["run_dir"]), again["mlflow_run_id"])) == 1


@pytest.mark.usefixtures("pictures")
def test_no_plot_model_or_file_fails_a_run(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = job.parent / "runs" / "poor"
    run_dir.mkdir(parents=True)
    (run_dir / "plots").write_text("in the way of the plots")
    changes = [*TRACKED, "steps=3", "task=task.py:NoExample"]
    (run_dir / "config.yaml").write_text(to_yaml(load_config(job, changes)))
    result = api.resume(run_dir)
    assert result["status"] == "FINISHED"
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert "the plots are not drawn: " in caplog.text
    assert (
        "the model is not recorded: TaskError: NoExample.example_inputs() fails: KeyError: 'inputs'"
        in caplog.text
    )


# -- bad input


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (["task=task.py:Missing"], TaskError, ["Missing", "Own"]),
        (["task=nowhere.py:Own"], TaskError, ["nowhere.py"]),
        (["task=no.such.module:Own"], TaskError, ["no.such.module"]),
        (["task_args.wdth=3"], TaskError, ["wdth", "width"]),
        (["task=task.py:VectorLoss"], TaskError, ["VectorLoss.loss", "scalar", "[4, 1]"]),
        (["task=task.py:Detached"], TaskError, ["Detached.loss", "not differentiable"]),
        (["task=task.py:Broken"], TaskError, ["Broken", "RuntimeError"]),
        (["task=task.py:Frozen"], TaskError, ["trainable"]),
        (["task=task.py:NoModel"], TaskError, ["Module", "str"]),
        (["task=task.py:Empty"], DataError, ["empty"]),
        (["batches.gradient=41"], DataError, ["batches.gradient", "41", "40"]),
        (["batches.curvature=99"], DataError, ["batches.curvature", "99", "40"]),
        (["optim.dampng=1"], ConfigError, ["optim.dampng", "optim.damping"]),
        (["optim.damping=-1"], ConfigError, ["damping", "-1"]),
        (["steps=many"], ConfigError, ["steps", "many"]),
        (["device=toaster"], ConfigError, ["toaster"]),
        (["device=cuda:7"], ConfigError, ["cuda:7"]),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else None,
)
def test_bad_input_is_one_message_and_leaves_nothing(
    job: Path, changes: list[str], error: type[UserError], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        hfdist.train(job, changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert caught.value.exit_code == 2
    runs = job.parent / "runs"
    assert not runs.exists() or list(runs.iterdir()) == []


def test_a_checkpoint_of_another_model_is_named(job: Path) -> None:
    run_dir = hfdist.train(job, ["steps=2"])["run_dir"]
    with pytest.raises(CheckpointError, match="another model"):
        api.resume(run_dir, ["steps=4", "task_args.width=7"])


def test_an_unwritable_output_is_named(job: Path) -> None:
    file = job.parent / "file"
    file.write_text("")
    with pytest.raises(StorageError, match="output"):
        hfdist.train(job, [f"output={file}/runs"])


def test_a_run_is_not_started_twice(job: Path) -> None:
    hfdist.train(job, ["steps=1"], run_id="twice")
    with pytest.raises(ConfigError, match="resume"):
        hfdist.train(job, ["steps=1"], run_id="twice")


def test_no_run_folder_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run's folder"):
        api.resume(tmp_path)


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        (["batches.microbatch=1"], True),
        (["batches.microbatch=23"], True),  # 24 examples: the last is alone
        (["batches.gradient=1", "batches.curvature=null", "batches.line_search=null"], True),
        (["batches.microbatch=2"], False),
    ],
)
def test_one_example_under_batch_norm_is_told_before_training(
    job: Path, changes: list[str], is_refused: bool
) -> None:
    if not is_refused:
        assert hfdist.train(job, ["steps=1", *changes])["status"] == "FINISHED"
        return
    with pytest.raises(ConfigError, match="batch norm cannot normalise a microbatch of 1 example"):
        hfdist.train(job, changes)
    assert not list((job.parent / "runs").glob("*/metrics.jsonl"))


def test_another_damping_on_resume_takes_effect(job: Path) -> None:
    # Levenberg and Marquardt's factors: the next lambda is known.
    whole = records(hfdist.train(job, [*CG_OVERRIDES, "steps=4"]))
    part = hfdist.train(job, [*CG_OVERRIDES, "steps=3"])
    kept = records(api.resume(part["run_dir"], ["steps=4"]))
    assert kept[3]["damping"] == whole[3]["damping"]
    changed = records(api.resume(part["run_dir"], ["steps=5", "optim.damping=7"]))
    assert changed[4]["damping"] == 7.0
    again = records(api.resume(part["run_dir"], ["steps=6"]))
    assert again[5]["damping"] in (7.0, pytest.approx(7.0 * 1.5), pytest.approx(7.0 / 1.5))


# -- runs that train nothing


@pytest.mark.parametrize(
    ("task", "words"),
    [("NaN", ["nan", "4 steps"]), ("Uphill", ["none of 4 steps was accepted", "optim.damping"])],
)
def test_a_run_that_trains_nothing_has_failed(job: Path, task: str, words: list[str]) -> None:
    wrong = [f"task=task.py:{task}", "task_args.dropout=0", "optim.verify=off"]
    result = hfdist.train(job, [*CG_OVERRIDES, "steps=4", *wrong])
    assert result["status"] == "FAILED"
    assert result["steps"] == 4
    for word in words:
        assert word in result["error"]
    text = (Path(result["run_dir"]) / "result.json").read_text()
    assert "NaN" not in text.replace(result["error"], "")  # JSON has none
    assert json.loads(text) == result
    # Nothing is lost: the run can go on, with another rule.
    again = api.resume(result["run_dir"], ["steps=5"])
    assert (again["status"], again["steps"]) == ("FAILED", 5)


def test_a_run_at_rest_is_no_failure(job: Path) -> None:
    result = hfdist.train(job, ["task=task.py:Bottom", "steps=2"])
    assert result["status"] == "FINISHED"


def test_fewer_steps_than_are_done_are_refused(job: Path) -> None:
    run_dir = Path(hfdist.train(job, ["steps=3"])["run_dir"])
    before = {
        p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and "logs" not in p.parts
    }
    with pytest.raises(ConfigError, match=r"steps is 2, but the run has done 3") as caught:
        api.resume(run_dir, ["steps=2"])
    assert caught.value.exit_code == 2
    after = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and "logs" not in p.parts}
    assert after == before


@pytest.mark.parametrize(
    "run_id", ["../x", "a b/e", "", ".", "..", "-x", "x" * 300, "a\nb", "a/b", "\0"]
)
def test_run_ids_are_checked_before_anything_is_made(job: Path, run_id: str) -> None:
    with pytest.raises(ConfigError, match="run id"):
        hfdist.train(job, run_id=run_id)
    assert not (job.parent / "runs").exists()
