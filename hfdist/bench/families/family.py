"""What a model family is: a tiny model of it, a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfdist.tasks.task import Task

Source = str
"""The library that a family comes from; what is not installed is left out."""


def cross_entropy(logits: Tensor, batch: Any) -> Tensor:
    """Mean over everything that has a label: logits [..., C], labels [...]; -100 is no label."""
    labels = batch["labels"] if isinstance(batch, dict) else batch[1]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def mse(logits: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(logits, batch["labels"] if isinstance(batch, dict) else batch[1])


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny random model, a batch, and a loss that is a function of one output tensor.

    `model` and `batch` are made after `torch.manual_seed`; the model is then converted to float64.
    """

    name: str
    source: Source
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    """(inputs, labels), or a dict with "labels"; floating point tensors in float64."""
    criterion: Callable[[Tensor, Any], Tensor] = cross_entropy
    """(logits, batch) -> mean loss."""
    logits: Callable[[Any], Tensor] = lambda outputs: outputs
    """The tensor in the model's outputs that the criterion takes."""
    own_loss: bool = False
    """The model gets the labels and returns the loss itself, as `outputs.loss`."""
    training: bool = False
    tolerance: float = 1e-9
    """Relative, of gradient and product."""

    def task(self) -> Task:
        return _FamilyTask(self)


class _FamilyTask(Task):
    def __init__(self, family: Family) -> None:
        self.family = family

    def model(self) -> nn.Module:
        return self.family.model().double().train(self.family.training)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        if self.family.own_loss:
            return model(**batch)
        return super().forward(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        if self.family.own_loss:
            return outputs.loss
        return self.family.criterion(self.family.logits(outputs), batch)


def normal(*shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, dtype=torch.float64)
