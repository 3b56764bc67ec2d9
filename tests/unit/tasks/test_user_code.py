"""Whatever a task's own code does: one message with task, method and the user's line."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import hfdist
from hfdist.errors import DataError, TaskError, TaskFailure, UserError
from hfdist.tasks.functions import Rosenbrock
from hfdist.tasks.loading import load_task
from hfdist.training.worker import evaluate_run

sys.path.insert(0, str(Path(__file__).parents[2]))
from mutated_jobs import JOB, TASK

METHODS = (
    *("__init__", "model", "forward", "loss", "train_data", "eval_data", "metrics", "collate"),
    *("example_costs", "__len__", "__getitem__"),
)


@pytest.fixture
def job(tmp_path: Path):
    """Writes the job with `line` first in the body of `method`; returns its path and the line's number."""

    def write(method: str = "", *lines: str) -> tuple[Path, int]:
        text = TASK.splitlines()
        number = 0
        if method:
            number = max(i for i, t in enumerate(text) if t.strip().startswith(f"def {method}("))
            text[number + 1 : number + 1] = [f"        {line}" for line in lines]
        (tmp_path / "task.py").write_text("\n".join(text))
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(JOB | {"output": str(tmp_path / "runs")}))
        return path, number + 1 + len(lines)

    return write


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise ZeroDivisionError('by zero\\nsecond line')", ["ZeroDivisionError: by zero"]),
        ("sys.exit(3)", ["sys.exit(3)", "raise an exception"]),
    ],
    ids=["raise", "exit"],
)
def test_errors_name_task_method_and_line(
    job: Any, method: str, line: str, words: list[str]
) -> None:
    path, number = job(method, line)
    with pytest.raises(UserError) as caught:
        hfdist.train(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "second line" not in message
    assert "Own" in message
    assert f"{path.parent / 'task.py'}:{number}" in message
    shown = {"__len__": "len(Data)", "__getitem__": "Data[0]"}.get(method, f"Own.{method}()")
    assert shown in message
    for word in words:
        assert word in message
    # Metrics and the model's signature are first asked for after training has begun.
    late = method in ("metrics", "example_inputs")
    assert caught.value.exit_code == (1 if late else 2)
    assert isinstance(caught.value, TaskFailure) == late


@pytest.mark.parametrize("line", ["raise ZeroDivisionError('by zero')", "sys.exit(3)"])
def test_example_inputs_that_fail_cost_the_model_record_and_no_run(
    job: Any, line: str, caplog: Any
) -> None:
    path, number = job("example_inputs", line)
    assert hfdist.train(path)["status"] == "FINISHED"
    warning = next(r.getMessage() for r in caplog.records if "not recorded" in r.getMessage())
    assert "Own.example_inputs()" in warning
    assert f"{path.parent / 'task.py'}:{number}" in warning


def test_an_error_in_the_middle_of_a_run_is_a_failure_and_no_mistake(job: Any) -> None:
    body = ["self.calls = getattr(self, 'calls', 0) + 1", "assert self.calls < 9, 'too often'"]
    path, number = job("loss", *body)
    with pytest.raises(
        TaskFailure, match=rf"Own\.loss\(\) fails: AssertionError: too often .*:{number}\)"
    ):
        hfdist.train(path, ["steps=9"], run_id="late")
    result = (path.parent / "runs" / "late" / "result.json").read_text()
    assert '"FAILED"' in result
    assert "Own.loss() fails" in result


def test_hooks_and_backward_passes_of_the_user_are_user_code(job: Any) -> None:
    hook = (
        "batch[0].sum(), outputs.register_hook(lambda g: g[99]) if outputs.requires_grad else None"
    )
    path, number = job("loss", hook)
    with pytest.raises(TaskFailure, match=rf"Own.* fails: IndexError.*task\.py:{number}"):
        hfdist.train(path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("None", "None"),
        ("3", "int"),
        ("[1.0]", "list"),
        ("{'a': 'b'}", "'a'"),
        ("{'a': torch.ones(3)}", r"\[3\]"),
        ("{1: 2.0}", "texts"),
        ("{'loss': 2.0}", "rename"),
        ("{'a': (1.0, 2.0, 3.0)}", "tuple"),
        ("{'a': None}", "None"),
    ],
)
def test_metrics_are_a_dict_of_numbers(job: Any, value: str, words: str) -> None:
    path, _ = job("metrics", f"return {value}")
    with pytest.raises(TaskFailure, match=rf"Own\.metrics\(\).*{words}"):
        hfdist.train(path)


def test_metrics_may_be_plain_numbers_and_pairs(job: Any) -> None:
    path, _ = job("metrics", "return {'a': 1, 'b': True, 'c': (2.0, 4), 'd': torch.tensor([3.0])}")
    result = hfdist.train(path)
    assert [result[f"eval_{name}"] for name in "abcd"] == [1.0, 1.0, 0.5, 3.0]


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("torch.nn.LazyLinear(3)", r"weight has no shape yet: run the model once"),
        ("torch.nn.Linear(2, 0)", r"weight of shape \[0, 2\] has no elements"),
        ("torch.nn.Linear(2, 3, dtype=torch.complex64)", r"weight is complex: .*view_as_real"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_parameters_that_cannot_be_trained_are_named(job: Any, layer: str, words: str) -> None:
    path, _ = job("model", "import torch", f"return {layer}")
    with pytest.raises(TaskError, match=rf"Own\.model\(\): parameter {words}"):
        hfdist.train(path)


def test_a_task_file_that_was_edited_is_read_again(job: Any) -> None:
    """Within the second, and of the same length: what Python's own cache would not see."""
    for number in (1.0, 2.0):
        path, _ = job("metrics", f"return {{'a': {number}}}")
        assert hfdist.train(path)["eval_a"] == number
    task = load_task(f"{path.parent / 'task.py'}:Own", {})
    assert type(task) is type(load_task(f"{path.parent / 'task.py'}:Own", {}))


def test_data_that_is_none_or_empty_says_whose(job: Any) -> None:
    path, _ = job("train_data", "return None")
    with pytest.raises(TaskError, match=r"train_data\(\) returns None"):
        hfdist.train(path)
    path, _ = job("eval_data", "return Data(self.x[:0], self.x[:0])")
    with pytest.raises(DataError, match=r"eval_data\(\).*empty.*evaluate on"):
        hfdist.train(path)
    path, _ = job("train_data", "return Data(self.x[:0], self.x[:0])")
    with pytest.raises(DataError, match=r"train_data\(\).*empty.*train on"):
        hfdist.train(path)
    path, _ = job("train_data", "return iter([1])")
    with pytest.raises(DataError, match="a stream, of which a step sees"):
        hfdist.train(path)


@pytest.mark.parametrize("value", ["[1.0]", "'many'", "[float('nan')] * 12", "[-1.0] * 12"])
def test_costs_are_a_number_for_every_example(job: Any, value: str) -> None:
    path, _ = job("example_costs", f"return {value}")
    with pytest.raises(TaskError, match=r"Own\.example_costs\(\)"):
        hfdist.train(path)


def test_evaluate_tells_the_same(job: Any) -> None:
    path, _ = job()
    run_dir = hfdist.train(path)["run_dir"]
    secret = "task_args.dsn=x"
    assert evaluate_run(run_dir, overrides=[secret])["loss"] >= 0
    task = path.parent / "task.py"
    task.write_text(re.sub(r'return \{"error"', 'return 1 / 0, {"error"', task.read_text()))
    sys.modules.pop("task", None)
    with pytest.raises(TaskError, match=r"Own\.metrics\(\) fails: ZeroDivisionError"):
        evaluate_run(run_dir, overrides=[secret])


def test_what_is_no_method_is_told(tmp_path: Path) -> None:
    file = tmp_path / "not_methods.py"
    file.write_text(
        "from hfdist.tasks.functions import Rosenbrock\n"
        "class Attribute(Rosenbrock):\n    metrics = {'a': 1}\n"
        "class Property(Rosenbrock):\n    @property\n    def loss(self):\n        return 1\n"
    )
    with pytest.raises(TaskError, match=r"Attribute\.metrics is a dict: it must be a method"):
        load_task(f"{file}:Attribute", {}).metrics(None, None)
    with pytest.raises(TaskError, match=r"Property\.loss is a property"):
        load_task(f"{file}:Property", {})


def test_a_loaded_task_can_be_copied_and_pickled() -> None:
    task = load_task("hfdist.tasks.functions:Rosenbrock", {"dimension": 3})
    for twin in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert isinstance(twin, Rosenbrock)
        assert sum(p.numel() for p in twin.model().parameters()) == 3
