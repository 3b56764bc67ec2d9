"""scikit-learn's 1,797 real handwritten digits of 8x8 pixels: a classifier and an autoencoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.autoencoders import PixelAutoencoder, autoencoder, initialise_sparsely
from hfdist.tasks.images import small_resnet18
from hfdist.tasks.task import Batch, Outputs, Task

_EVERY = 5
"""Every fifth digit is held out: 1,437 to train on, 360 to evaluate on."""


@cache
def _digits() -> tuple[Tensor, Tensor]:
    rows = _rows()
    return torch.tensor(rows[:, :-1] / 16.0, dtype=torch.float32), torch.tensor(
        rows[:, -1].astype(numpy.int64)
    )


def _rows() -> numpy.ndarray:
    """Pixels and label of each digit, float64 [1797, 65], from scikit-learn's file: importing the package
    takes longer than a short run."""
    found = importlib.util.find_spec("sklearn")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return numpy.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # it keeps it elsewhere by now

    digits = load_digits()
    return numpy.column_stack([digits.data, digits.target])


def _split() -> tuple[ArrayData, ArrayData]:
    pixels, labels = _digits()  # [1797, 64] in [0, 1], [1797]
    held_out = torch.arange(len(labels)) % _EVERY == 0
    return ArrayData(pixels[~held_out], labels[~held_out]), ArrayData(
        pixels[held_out], labels[held_out]
    )


class _Digits(Task):
    def __init__(self) -> None:
        self._train, self._eval = _split()

    def train_data(self) -> ArrayData:
        return self._train

    def eval_data(self) -> ArrayData:
        return self._eval


class DigitsClassifier(_Digits):
    """A fully connected classifier; loss is the mean cross-entropy.

    Args:
        hidden: Widths of the hidden layers.
    """

    def __init__(self, hidden: Sequence[int] = (64, 32)) -> None:
        super().__init__()
        self._widths = _checked("hidden", hidden)

    def model(self) -> nn.Module:
        widths = [64, *self._widths]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 10))

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def metrics(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(-1) == batch[1]).float().mean()}


class DigitsAutoencoder(_Digits, PixelAutoencoder):
    """A deep autoencoder with logistic units and a linear code, untied, as in Hinton & Salakhutdinov
    2006; loss is the cross-entropy summed over pixels, mean over digits.

    Args:
        widths: Widths of the encoder's layers; the last is the code.
        sparse: Sparse initialisation [Martens 2010, sec. 5]: that many non-zero incoming weights a
            unit, N(0, 1), and zero biases; 0 keeps torch's own.
    """

    def __init__(self, widths: Sequence[int] = (128, 64, 32, 12), sparse: int = 15) -> None:
        super().__init__()
        self._widths, self._sparse = _checked("widths", widths), sparse

    def model(self) -> nn.Module:
        model = autoencoder([64, *self._widths])
        if self._sparse:
            initialise_sparsely(model, self._sparse)
        return model


class DigitsResNet18(_Digits):
    """ResNet-18 [He et al. 2016] on the digits, enlarged; loss is the mean cross-entropy.

    Args:
        side: Height and width of the images, at least 8.
        width: Channels of the first stage; 64 as published.
    """

    def __init__(self, side: int = 28, width: int = 64) -> None:
        super().__init__()
        if side < 8:
            raise TaskError(f"task_args.side is {side}: it must be at least 8")
        if width < 1:
            raise TaskError(f"task_args.width is {width}: it must be at least 1")
        self._side, self._width = side, width

    def model(self) -> nn.Module:
        return small_resnet18(10, self._width)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        images = batch[0].unflatten(1, (1, 8, 8))
        if self._side != 8:
            images = nn.functional.interpolate(images, (self._side, self._side), mode="bilinear")
        return model(images)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def metrics(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(-1) == batch[1]).float().mean()}


def _checked(key: str, widths: Sequence[int]) -> list[int]:
    if not widths or any(not isinstance(w, int) or w < 1 for w in widths):
        raise TaskError(f"task_args.{key} is {widths!r}: it must be a list of widths of at least 1")
    return list(widths)
