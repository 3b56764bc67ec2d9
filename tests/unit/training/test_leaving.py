"""A machine that will be taken away in the middle of a step: what was done before it is saved at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hfdist import api
from hfdist.comm import SerialCommunicator
from hfdist.config.job import load_config, to_yaml
from hfdist.rundir import files
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, run

TASK = """
import torch
from torch.utils.data import IterableDataset
from hfdist.tasks.digits import DigitsClassifier

class Endless(IterableDataset):
    def __init__(self, data):
        self.data = data
    def __iter__(self):
        while True:
            yield from (self.data[k] for k in range(100))

class Streamed(DigitsClassifier):
    def train_data(self):
        return Endless(super().train_data())
"""
JOB = """
name: leaving
task: hfdist.tasks.digits:DigitsClassifier
steps: 4
optim: {cg_max_iter: 8, cg_tol: 1.0e-9, solver: cg}
checkpoint: {every: 100}
tracking: {enabled: false}
"""
STREAM = [
    *(
        "task=task.py:Streamed",
        "batches.gradient=64",
        "batches.curvature=32",
        "batches.line_search=64",
    ),
]


class Watching(QuietDisplay):
    """Sees which checkpoints are there in each step's CG iterations."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.now: tuple[int, int] = (0, 0)
        self.seen: list[tuple[int, int, list[str]]] = []
        self.steps: list[int] = []

    def cg_iteration(self, step: int, iteration: int, max_iter: int) -> None:
        self.now = (step, iteration)
        folders = self.checkpoints.glob("*-step-*")
        self.seen.append((step, iteration, sorted(folder.name for folder in folders)))

    def step(self, step: int, report: Any, extra: Mapping[str, float]) -> None:
        self.steps.append(step)


@pytest.mark.parametrize(
    "changes",
    [[], STREAM, [*STREAM, "batches.loaders=1"], ["batches.loaders=1", "batches.gradient=64"]],
    ids=["folder", "stream", "stream in a process", "processes"],
)
def test_the_step_is_abandoned_and_what_is_done_is_saved(
    changes: list[str], tmp_path: Path
) -> None:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "job.yaml").write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    undisturbed = api.train(tmp_path / "job.yaml", changes, run_id="undisturbed")
    config = load_config(tmp_path / "job.yaml", changes)
    run_dir = tmp_path / "runs" / "leaving"
    run_dir.mkdir(parents=True)
    (run_dir / files.JOB).write_text(to_yaml(config))
    display = Watching(run_dir / files.CHECKPOINTS)
    job = Job(config=config, run_dir=run_dir, is_leaving=lambda: display.now >= (2, 3))
    result = run(job, SerialCommunicator(torch.device("cpu")), display)
    abandoned = next(k for k, (step, i, _) in enumerate(display.seen) if step == 2 and i >= 3)
    before, after = display.seen[: abandoned + 1], display.seen[abandoned + 1 :]
    assert not any(folders for _, _, folders in before)
    # At most one more iteration of that step: it begins anew, and steps 0 and 1 are saved.
    again = next(k for k, (step, i, _) in enumerate(after) if step == 2 and i == 1)
    assert again <= 1
    assert after[again][2] == ["000001-step-00000002"]
    assert display.steps == [0, 1, 2, 3]
    assert result["parameters_sha256"] == undisturbed["parameters_sha256"]
    steps = [json.loads(s)["step"] for s in (run_dir / files.METRICS).read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
