"""A plain regression of tabular data that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.task import Batch, Outputs, Task


@cache
def _diabetes() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_diabetes

    features, target = load_diabetes(return_X_y=True, scaled=False)
    X = torch.tensor(features, dtype=torch.float32)  # [442, 10]
    y = torch.tensor(target, dtype=torch.float32)[:, None]  # [442, 1]
    return (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()


class Diabetes(Task):
    """Progression of diabetes of 442 patients [Efron et al. 2004] from ten numbers each, standardised; a
    fully connected network with tanh units; loss is half the mean squared error.

    Args:
        hidden: Widths of the hidden layers.
    """

    def __init__(self, hidden: Sequence[int] = (64, 64)) -> None:
        if not hidden or any(not isinstance(w, int) or w < 1 for w in hidden):
            raise TaskError(f"task_args.hidden is {hidden!r}: it must be widths of at least 1")
        self._widths = [10, *hidden]

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in pairwise(self._widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(self._widths[-1], 1))

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return 0.5 * nn.functional.mse_loss(outputs, batch[1])

    def train_data(self) -> ArrayData:
        return ArrayData(*_diabetes())
