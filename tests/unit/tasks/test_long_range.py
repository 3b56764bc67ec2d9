"""The addition and multiplication problems: what is drawn, where training starts, how steps are computed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hfdist
from hfdist.config.job import from_dict
from hfdist.errors import TaskError
from hfdist.tasks.long_range import LongAddition, LongMultiplication, draw
from hfdist.tasks.residuals import PointSets

SPEC = "hfdist.tasks.long_range:{}"


def drawn(data: PointSets | None, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences [n, time, 2], lengths [n] and results [n]."""
    assert data is not None
    _, ((sequences, lengths), results) = data.points(0, number, torch.arange(len(data)))
    return sequences, lengths, results


def train(tmp_path: Path, task: str, **values: Any) -> dict[str, Any]:
    job = {
        "task": SPEC.format(task),
        "device": "cpu",
        "output": str(tmp_path),
        "tracking": {"enabled": False},
        "evaluate": {"batch": 1000},
        **values,
    }
    return hfdist.train(from_dict(job))


@pytest.mark.parametrize("make", [LongAddition, LongMultiplication])
def test_the_result_is_that_of_the_two_marked_numbers(make: type[LongAddition]) -> None:
    task = make(sequences=4000, length=40)
    sequences, lengths, results = drawn(task.train_data())
    assert (int(lengths.min()), int(lengths.max()), sequences.shape[1]) == (40, 44, 44)
    numbers, marks = sequences.unbind(-1)
    places = marks.nonzero()[:, 1].view(-1, 2)
    assert (int(places[:, 0].min()), int(places[:, 0].max())) == (0, 3)
    assert (int(places[:, 1].min()), int(places[:, 1].max())) == (4, 19)
    two = numbers.gather(1, places)
    assert torch.equal(results, two.sum(1) if make is LongAddition else two.prod(1))
    padding = torch.arange(44) >= lengths[:, None]
    assert not sequences[padding].any()
    assert (numbers[~padding] > 0).float().mean() > 0.999
    assert float(results.var()) == pytest.approx(task.variance, rel=0.1)


def test_sequences_are_new_in_every_step_and_others_are_held_out() -> None:
    torch.manual_seed(0)
    task = LongAddition(sequences=50, evaluation=50)
    data = task.train_data()
    numbers = [drawn(data, step)[0] for step in (0, 1)] + [drawn(task.eval_data())[0]]
    assert torch.equal(drawn(data, 0)[0], numbers[0])
    assert torch.equal(drawn(task.eval_data())[0], numbers[2])
    firsts = {float(x[0, 0, 0]) for x in numbers}
    assert len(firsts) == 3
    assert LongAddition(evaluation=0).eval_data() is None


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_derivatives_reach_back_to_the_start(cell: str) -> None:
    """Under torch's own initialisation 1e-17 of them is left."""
    torch.manual_seed(0)
    (x, lengths), _ = draw(torch.Generator().manual_seed(0), 50, 80)
    x.requires_grad_()
    model = LongAddition(cell=cell, hidden=16).model()
    model(x, lengths).sum().backward()
    assert x.grad is not None
    first, last = x.grad[:, :8].norm(), x.grad[:, 72:80].norm()
    assert first > 1e-3 * last


@pytest.mark.parametrize("changes", [{"length": 19}, {"cell": "gru"}])
def test_arguments_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="task_args"):
        LongAddition(**changes)


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_all_rows_come_from_one_backward_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cell: str
) -> None:
    args = {"sequences": 40, "evaluation": 20, "length": 20, "hidden": 5, "cell": cell}
    with caplog.at_level(logging.WARNING):
        result = train(tmp_path, "LongAddition", task_args=args, steps=3)
    assert "one after the other" not in caplog.text
    assert result["status"] == "FINISHED"
    assert result["eval_squares"] == pytest.approx(2 * result["eval_loss"])
    assert result["eval_unexplained"] == pytest.approx(6 * result["eval_squares"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "error"), [("LongAddition", 0.00025), ("LongMultiplication", 0.0013)]
)
def test_they_are_learnt(tmp_path: Path, task: str, error: float) -> None:
    """On sequences half as long, to the squared errors that Sutskever et al. 2013 print for 80 steps."""
    result = train(tmp_path, task, task_args={"length": 40, "sequences": 300}, steps=40)
    assert result["eval_squares"] < error
