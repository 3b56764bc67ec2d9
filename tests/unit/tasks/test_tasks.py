"""Every built-in task is built, differentiated and evaluated; the data is what it claims to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hfdist
from hfdist.config.job import load_config
from hfdist.data.loader import BatchLoader
from hfdist.data.plan import MicrobatchPlan
from hfdist.errors import TaskError
from hfdist.tasks.curves import draw_curves
from hfdist.tasks.digits import DigitsAutoencoder, DigitsResNet18
from hfdist.tasks.functions import Rosenbrock
from hfdist.tasks.loading import load_task
from hfdist.tasks.task import Task, num_examples

JOBS = sorted((Path(__file__).parents[3] / "deploy" / "jobs").glob("*.yaml"))
SMALL: dict[str, dict[str, Any]] = {"curves": {"train": 20, "evaluation": 5}}


def task_of(job: Path) -> Task:
    config = load_config(job)
    return load_task(config.task, {**config.task_args, **SMALL.get(job.stem, {})})


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_job_names_a_task_that_has_a_gradient(job: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    task = task_of(job)
    model = task.model().to(dtype)
    data = task.train_data()
    batch = None
    if data is not None:
        made = BatchLoader(task, data, torch.device("cpu"), dtype)
        batch = made.load(MicrobatchPlan(number=0, indices=torch.arange(4)))
        assert num_examples(batch) == 4
    outputs = task.forward(model, batch)
    loss = task.loss(outputs, batch)
    total = loss[0] if isinstance(loss, tuple) else loss
    assert total.dtype == dtype
    trainable = [p for p in model.parameters() if p.requires_grad]
    # A Laplacian does not depend on the last layer's bias.
    found = torch.autograd.grad(total, trainable, allow_unused=hasattr(task, "terms"))
    grads = [g for g in found if g is not None]
    assert len(grads) >= len(trainable) - 1
    assert all(g.isfinite().all() for g in grads)
    assert any(g.any() for g in grads)
    for value in task.metrics(outputs, batch).values():
        first = value[0] if isinstance(value, tuple) else value
        assert torch.as_tensor(first).numel() == 1


@pytest.mark.parametrize(
    ("name", "changes", "goal"),
    [
        ("rosenbrock", [], 1e-20),
        ("quadratic", [], 1e-15),
        ("small_net", ["steps=12"], 0.02),
        ("small_net_accumulated", ["steps=12"], 0.02),
        ("digits_classifier", ["steps=12"], 0.2),
        ("lstm", ["steps=8", "task_args={examples: 64, length: 6}"], 0.02),
        (
            "transformer",
            ["steps=3", "task_args={examples: 32, width: 16, layers: 1, length: 16}"],
            5,
        ),
    ],
)
def test_jobs_train(name: str, changes: list[str], goal: float, tmp_path: Path) -> None:
    job = next(j for j in JOBS if j.stem == name)
    result = hfdist.train(job, [f"output={tmp_path}", "tracking.enabled=false", *changes])
    assert result["status"] == "FINISHED"
    assert result["final_loss"] < goal


def test_curves_are_calibrated_against_the_original() -> None:
    """Total variance about 16, and about 6 of it left by the first 18 principal components."""
    images = draw_curves(2000, seed=3)
    assert images.shape == (2000, 784)
    assert images.min() >= 0
    assert images.max() <= 1
    variances = torch.linalg.svdvals(images - images.mean(0)).square() / len(images)
    assert float(variances.sum()) == pytest.approx(16, abs=1.0)
    assert float(variances[18:].sum()) == pytest.approx(6, abs=0.5)
    assert torch.equal(draw_curves(300, seed=3), draw_curves(300, seed=3))


def test_digits_are_split_and_scaled() -> None:
    task = DigitsAutoencoder()
    train, held_out = task.train_data(), task.eval_data()
    assert (len(train), len(held_out)) == (1437, 360)
    pixels = train.batch(torch.arange(len(train)))[0]
    assert pixels.shape == (1437, 64)
    assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)


def test_sparse_initialisation_has_so_many_incoming_weights() -> None:
    for layer in DigitsAutoencoder(sparse=15).model():
        if isinstance(layer, torch.nn.Linear):
            expected = min(15, layer.in_features)
            assert ((layer.weight != 0).sum(1) == expected).all()
            assert not layer.bias.any()


def test_rosenbrock_is_rosenbrocks() -> None:
    task = Rosenbrock(3)
    model = task.model().double()
    x, y, z = model.point.tolist()
    expected = (1 - x) ** 2 + 100 * (y - x**2) ** 2 + (1 - y) ** 2 + 100 * (z - y**2) ** 2
    assert float(task.loss(task.forward(model, None), None)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("hfdist.tasks.digits:DigitsClassifier", {"hidden": []}),
        ("hfdist.tasks.functions:Rosenbrock", {"dimension": 1}),
        ("hfdist.tasks.small_net:SmallNet", {"dropout": 1.0}),
        ("hfdist.tasks.sequences:TextTransformer", {"width": 9, "heads": 2}),
        ("hfdist.tasks.images:AllCNNC", {"classes": 0}),
    ],
)
def test_bad_arguments_are_named(spec: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="task_args"):
        load_task(spec, arguments)


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    from hfdist.tasks.digits import _digits

    pixels, labels = load_digits(return_X_y=True)
    ours, numbers = _digits()
    assert torch.equal(ours, torch.tensor(pixels / 16.0, dtype=torch.float32))
    assert torch.equal(numbers, torch.tensor(labels))
    assert numbers.dtype == torch.int64


def test_a_narrow_resnet18_has_the_same_layers_of_fewer_channels() -> None:
    narrow, whole = (DigitsResNet18(side=8, width=width).model() for width in (8, 64))
    assert [name for name, _ in narrow.named_parameters()] == [
        name for name, _ in whole.named_parameters()
    ]
    assert [8 * a.shape[0] for a in narrow.parameters()][:-2] == [
        b.shape[0] for b in whole.parameters()
    ][:-2]
    assert narrow(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(TaskError, match="width is 0"):
        DigitsResNet18(width=0)
