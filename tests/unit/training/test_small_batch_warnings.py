"""Batches drawn anew each step: what is noticed, and said."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import hfdist
from hfdist import HessianFree, api

TASK = """
import torch
from torch import nn
from hfdist import Task
from hfdist.tasks.array_data import ArrayData

class Noise(Task):
    \"\"\"Labels that have nothing to do with the inputs: there is nothing to learn but the noise.\"\"\"
    def model(self):
        return nn.Linear(20, 2)
    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])
    def train_data(self):
        g = torch.Generator().manual_seed(3)
        return ArrayData(torch.randn(400, 20, generator=g), torch.randint(2, (400,), generator=g))
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    path = tmp_path / "job.yaml"
    values = {
        "task": "task.py:Noise",
        "steps": 24,
        "checkpoint": {"every": 12},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["run_dir"]) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def count(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


FOUND, BEFORE = "follow their noise. Take more examples", "drawn anew each step"


def test_steps_on_noise_are_told_once_and_resume_is_exact(
    job: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    whole = hfdist.train(job, ["batches.gradient=40"])
    assert (count(caplog, FOUND), count(caplog, BEFORE)) == (1, 1)
    part = hfdist.train(job, ["batches.gradient=40", "steps=12"])
    rest = api.resume(part["run_dir"], ["steps=24"])
    assert rest["parameters_sha256"] == whole["parameters_sha256"]
    kept = [record.get("kept_gain") for record in records(whole)]
    assert [record.get("kept_gain") for record in records(rest)] == kept
    assert count(caplog, FOUND) == 2


def test_whole_batches_are_told_nothing(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    hfdist.train(job)
    assert (count(caplog, FOUND), count(caplog, BEFORE)) == (0, 0)


def test_a_loop_of_ones_own_is_told_once_and_only_of_batches_drawn_anew() -> None:
    def warned(batch: int, steps: int = 24) -> int:
        torch.manual_seed(0)
        x, y = torch.randn(400, 20), torch.randint(2, (400,))
        model = nn.Linear(20, 2)
        optimizer = HessianFree(model.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(steps):
                chosen = torch.arange(step * batch, (step + 1) * batch) % 400
                pairs = [(x[chosen], y[chosen])]
                optimizer.acc_step(model, nn.functional.cross_entropy, pairs)
        return sum(FOUND in str(warning.message) for warning in caught)

    assert warned(40) == 1
    assert warned(400) == 0
