"""Tasks for ranks: small, in several shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.task import Task

N = 41


class Mlp(Task):
    """Fully connected, with dropout if asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.dropout = dropout
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, 5, generator=g)
        self.y = torch.randint(3, (N,), generator=g)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(7, 3))

    def train_data(self) -> ArrayData:
        return ArrayData(self.x, self.y)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class Conv(Mlp):
    """Convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(1))

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(),
            nn.Conv2d(3, 4, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
