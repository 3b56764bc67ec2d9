"""Runs on streams and Hugging Face data sets, with and without processes that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfdist import api
from hfdist.errors import DataError

TASK = """
import torch
from torch import nn
from torch.utils.data import IterableDataset
from hfdist import Task

X = torch.linspace(-1, 1, 22).reshape(-1, 1)

class Lines(IterableDataset):
    position = 0
    def __iter__(self):
        while self.position < len(X):
            self.position += 1
            yield X[self.position - 1], X[self.position - 1].sin()
    def state_dict(self):
        return {"position": self.position}
    def load_state_dict(self, state):
        self.position = state["position"]

class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return len(X)
    def __getitem__(self, index):
        noise = 0.01 * torch.randn(1) * self.noise
        return X[index] + noise, X[index].sin()
    noise = 0.0

class Streamed(Task):
    def model(self):
        return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    def loss(self, outputs, batch):
        return nn.functional.mse_loss(outputs, batch[1])
    def train_data(self):
        return Lines()
    def eval_data(self):
        return Lines()
    def metrics(self, outputs, batch):
        return {"error": (outputs - batch[1]).abs().mean()}

class Mapped(Streamed):
    def train_data(self):
        return Pairs()
    def eval_data(self):
        return Pairs()

class Noisy(Streamed):
    def train_data(self):
        pairs = Pairs()
        pairs.noise = 1.0
        return pairs

class HuggingFace(Streamed):
    target_keys = ("y",)
    def loss(self, outputs, batch):
        return nn.functional.mse_loss(outputs, batch["y"])
    def forward(self, model, batch):
        return model(batch["x"])
    def metrics(self, outputs, batch):
        return {}
    def example_inputs(self, batch):
        return batch["x"]
    def rows(self):
        from datasets import Dataset
        return Dataset.from_dict({"x": X.tolist(), "y": X.sin().tolist()}).with_format("torch")
    def train_data(self):
        return self.rows()
    def eval_data(self):
        return self.rows()

class HuggingFaceStream(HuggingFace):
    def train_data(self):
        return self.rows().to_iterable_dataset()
"""
JOB = """
name: data
steps: 5
batches: {gradient: 8, curvature: null, line_search: 2}
optim: {damping: 0.1, cg_max_iter: 4}
checkpoint: {every: 1, asynchronous: false}
tracking: {enabled: false}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "job.yaml").write_text(JOB + f"output: {tmp_path / 'runs'}\n")
    return tmp_path / "job.yaml"


def losses(result: dict[str, Any]) -> list[tuple[float, float]]:
    lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [(r["final_loss"], r["eval/loss"]) for r in map(json.loads, lines)]


@pytest.mark.parametrize(
    ("name", "loaders"),
    [
        ("Streamed", 0),
        pytest.param("Streamed", 1, marks=pytest.mark.slow),
        ("HuggingFaceStream", 0),
    ],
)
def test_a_resumed_run_sees_what_the_undisturbed_one_sees(
    job: Path, name: str, loaders: int
) -> None:
    changes = [f"task=task.py:{name}", f"batches.loaders={loaders}"]
    whole = api.train(job, changes, run_id="whole", display="quiet")
    part = api.train(job, [*changes, "steps=3"], run_id="part", display="quiet")
    resumed = api.resume(part["run_dir"], ["steps=5"], display="quiet")
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]
    assert losses(resumed) == losses(whole)
    assert len({final for final, _ in losses(whole)}) == 5
    if name == "Streamed":
        lines = (Path(whole["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["examples"] for line in lines] == [8.0, 16.0, 24.0, 32.0, 40.0]


@pytest.mark.slow
def test_random_numbers_of_loaders_belong_to_their_microbatch(job: Path) -> None:
    """Whoever loads it, and in whatever order."""
    changes = ["task=task.py:Noisy", "batches.microbatch=4"]
    found = [
        api.train(job, [*changes, f"batches.loaders={n}"], run_id=f"n{n}", display="quiet")
        for n in (1, 2)
    ]
    part = api.train(
        job, [*changes, "batches.loaders=2", "steps=2"], run_id="part", display="quiet"
    )
    found.append(api.resume(part["run_dir"], ["steps=5"], display="quiet"))
    assert len({result["parameters_sha256"] for result in found}) == 1


def test_who_loads_makes_no_difference(job: Path) -> None:
    changes = ["batches.microbatch=4", "steps=3"]
    cases = (("Mapped", 0), ("Mapped", 2), ("HuggingFace", 0))
    found = [
        api.train(job, [*changes, f"task=task.py:{name}", f"batches.loaders={n}"], display="quiet")
        for name, n in cases
    ]
    assert len({result["parameters_sha256"] for result in found}) == 1


@pytest.mark.ranks
def test_a_stream_is_the_same_on_two_workers_and_goes_on_there(job: Path) -> None:
    changes = ["task=task.py:Streamed", "batches.microbatch=2", "dtype=float64"]
    one = api.train(job, changes, run_id="one", display="quiet")
    first = api.train(job, [*changes, "steps=2"], run_id="first", display="quiet")
    two = api.resume(first["run_dir"], ["steps=5", "launch.workers=2"], display="quiet")
    for (a, b), (c, d) in zip(losses(one), losses(two)):
        assert a == pytest.approx(c, rel=1e-9)
        assert b == pytest.approx(d, rel=1e-9)


def test_what_a_stream_wants_of_the_job(job: Path) -> None:
    with pytest.raises(DataError, match=r"batches\.gradient=1000"):
        api.train(job, ["task=task.py:Streamed", "batches.gradient=null"], display="quiet")
    from hfdist.errors import ConfigError

    with pytest.raises(ConfigError, match="loaders is -1"):
        api.train(job, ["task=task.py:Streamed", "batches.loaders=-1"], display="quiet")
