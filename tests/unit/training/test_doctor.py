"""`hfdist doctor`: every fault has its finding, with a fix; a sound job has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hfdist.cli.app import app
from hfdist.config.job import RunConfig, from_dict
from hfdist.training.doctor import Finding, examine

TASKS = Path(__file__).with_name("doctor_tasks.py")


def job(task: str, **values: Any) -> RunConfig:
    return from_dict(
        {"task": f"{TASKS}:{task}", "device": "cpu", "optim": {"solver": "cg"}, **values}
    )


def found(task: str, check: str, **values: Any) -> list[Finding]:
    return [finding for finding in examine(job(task, **values)) if finding.check == check]


@pytest.mark.parametrize("task", ["Sound", "Weighted"])
def test_nothing_is_wrong_with_a_sound_job(task: str) -> None:
    findings = examine(job(task))
    assert {finding.status for finding in findings} == {"ok"}, findings
    checks = {finding.check for finding in findings}
    assert checks >= {
        "task",
        "loss",
        "determinism",
        "reduction",
        "parameters",
        "gradient",
        "product",
    }


def test_a_function_without_data_is_looked_at_too() -> None:
    findings = examine(from_dict({"task": "hfdist.tasks.functions:Rosenbrock", "dtype": "float64"}))
    assert {finding.status for finding in findings} == {"ok"}, findings


@pytest.mark.parametrize(
    ("task", "check", "status", "text"),
    [
        ("Broken", "task", "wrong", "no weights"),
        ("SummedLoss", "reduction", "wrong", "first 16 and its other 32"),
        ("MaskedMean", "reduction", "wrong", "would change what is trained"),
        ("AllMasked", "loss", "wrong", "add up to 0"),
        ("NanLoss", "loss", "wrong", "the loss at the start is nan"),
        ("NanData", "data", "wrong", "contain NaN"),
        ("Stateful", "determinism", "wrong", "two evaluations of the same batch differ"),
        ("OtherRandomness", "determinism", "wrong", "two evaluations of the same batch differ"),
        ("Dropping", "dropout", "note", "1 draws random numbers"),
        ("Noisy", "dropout", "note", "the forward pass draws random numbers"),
        ("Unused", "parameters", "note", "unused.weight, unused.bias (35 numbers)"),
        ("Dead", "parameters", "note", "is zero on 48 examples"),
        ("WrongGradient", "gradient", "wrong", "gradient and loss disagree"),
        ("Augmented", "data", "note", "another one each time"),
        ("NotConvex", "product", "note", "v'Bv is negative"),
    ],
)
def test_each_fault_has_its_finding(task: str, check: str, status: str, text: str) -> None:
    findings = found(task, check)
    assert [finding.status for finding in findings] == [status]
    assert text in findings[0].text
    assert findings[0].fix


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"batches": {"microbatch": 12}}, "note"),
        ({"launch": {"workers": 2}}, "note"),
        ({"batches": {"gradient": 3}, "launch": {"workers": 2}}, "note"),
        ({"batches": {"gradient": 2}, "launch": {"workers": 2}}, "wrong"),
    ],
)
def test_batch_norm_depends_on_microbatches_and_workers(changes: Any, status: str) -> None:
    (finding,) = found("Norm", "batch norm", **changes)
    assert finding.status == status


def test_few_examples_and_many_workers_are_told() -> None:
    (finding,) = found("Sound", "batches", batches={"gradient": 20})
    assert finding.status == "note"
    assert "20 of 48" in finding.text
    (finding,) = found("Sound", "batches", launch={"workers": 50})
    assert (finding.status, finding.fix) == ("wrong", "lower launch.workers to at most 48")


def write(tmp_path: Path, task: str, more: str = "") -> list[str]:
    path = tmp_path / "job.yaml"
    path.write_text(f"task: {TASKS}:{task}\noutput: {tmp_path}/runs\noptim: {{solver: cg}}\n{more}")
    return ["doctor", str(path)]


def test_the_command_measures_a_step_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*write(tmp_path, "Sound"), "--json"])
    assert result.exit_code == 0, result.output
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert findings["step"]["status"] == "ok"
    assert "s a step at 1 worker" in findings["step"]["text"]
    assert findings["MLflow"]["text"].startswith("sqlite")
    assert findings["output"]["status"] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_the_command_ends_with_1_where_something_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, write(tmp_path, "SummedLoss"))
    assert result.exit_code == 1
    assert "reduction: wrong:" in result.stdout
    assert "fix:" in result.stdout
    assert "s a step" not in result.stdout


def test_servers_that_do_not_answer_are_told(tmp_path: Path) -> None:
    """Ports of this machine that nobody listens on."""
    more = "tracking: {uri: 'http://127.0.0.1:9'}\nlaunch: {backend: ray, address: '127.0.0.1:9'}\n"
    result = CliRunner().invoke(app, [*write(tmp_path, "Sound", more), "--steps", "0", "--json"])
    assert result.exit_code == 1, result.output
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert "MLflow at http://127.0.0.1:9 does not answer" in findings["MLflow"]["text"]
    assert findings["MLflow"]["status"] == "note"  # a run would go on without it
    assert "no Ray cluster answers at 127.0.0.1:9" in findings["Ray"]["text"]


def test_the_table_of_a_terminal_is_printed_whole(tmp_path: Path) -> None:
    from rich.console import Console

    from hfdist.cli import doctor

    console = Console(width=80, force_terminal=True, record=True)
    doctor._print([Finding(check="loss", status="note", text="a [b] " * 40, fix="c")], console)
    assert console.export_text().count("[b]") == 40
