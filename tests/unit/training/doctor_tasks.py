"""Tasks with one fault each, for `hfdist doctor`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfdist import ArrayData, Task


class Sound(Task):
    """Nothing is wrong with it."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def loss(self, outputs: Any, batch: Any) -> Any:
        return nn.functional.mse_loss(outputs, batch[1])

    def train_data(self) -> Any:
        x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
        return ArrayData(x, x.sum(1, keepdim=True).sin())


class SummedLoss(Sound):
    """Says that it is a mean."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        return nn.functional.mse_loss(outputs, batch[1], reduction="sum")


class MaskedMean(Sound):
    """A mean over what is not masked, as a scalar."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        mask = batch[1] > 0.5
        return (outputs - batch[1])[mask].square().mean()


class Weighted(Sound):
    """The same as it should be."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        mask = batch[1] > 0.5
        return (outputs - batch[1])[mask].square().sum(), mask.sum()


class AllMasked(Sound):
    def loss(self, outputs: Any, batch: Any) -> Any:
        return (outputs * 0.0).sum(), 0.0


class NanLoss(Sound):
    def loss(self, outputs: Any, batch: Any) -> Any:
        return (outputs.mean() - outputs.mean() - 1.0).log()


class NanData(Sound):
    def train_data(self) -> Any:
        x = torch.randn(48, 4)
        x[3, 2] = torch.nan
        return ArrayData(x, torch.zeros(48, 1))


class Stateful(Sound):
    """Each evaluation has another loss."""

    calls = 0

    def loss(self, outputs: Any, batch: Any) -> Any:
        Stateful.calls += 1
        return nn.functional.mse_loss(outputs, batch[1]) * (1.0 + 0.1 * Stateful.calls)


class OtherRandomness(Sound):
    """Numbers that are not torch's."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        import random

        return nn.functional.mse_loss(outputs, batch[1]) * (1.0 + random.random())


class Dropping(Sound):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 1))


class Noisy(Sound):
    """Random numbers without a dropout module."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0] + 0.1 * torch.randn_like(batch[0]))


class Norm(Sound):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Unused(Sound):
    def model(self) -> nn.Module:
        return _Unused()


class Dead(Sound):
    """The second layer is never reached: its input is zero."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
        nn.init.constant_(model[0].bias, -100.0)
        return model


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3.0 * g


class WrongGradient(Sound):
    def forward(self, model: nn.Module, batch: Any) -> Any:
        return _WrongBackward.apply(model[0](batch[0])).sum(1, keepdim=True) + model(batch[0])


class Augmented(Sound):
    """An example is never the same twice."""

    def train_data(self) -> Any:
        return _Augmented()


class _Augmented(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        return torch.randn(4), torch.zeros(1)


class Broken(Sound):
    def model(self) -> nn.Module:
        raise RuntimeError("no weights")


class NotConvex(Sound):
    """Its Gauss-Newton matrix is not positive semidefinite."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        return -nn.functional.mse_loss(outputs, batch[1])
