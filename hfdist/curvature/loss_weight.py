"""What a mean loss was divided by: not always the number of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.tasks.task import num_examples


def mean_weight(loss_function: Callable[..., Any], batch: tuple[Any, Any]) -> float | Tensor:
    """Normaliser of `loss_function(outputs, targets)` with a mean reduction.

    Class weights and ignored targets of torch's cross-entropy and NLL losses count as torch counts
    them; any other loss is taken for a mean over the examples.
    """
    targets = batch[1]
    if (
        isinstance(loss_function, (nn.CrossEntropyLoss, nn.NLLLoss))
        and loss_function.reduction == "mean"
        and isinstance(targets, Tensor)
        and not targets.is_floating_point()
    ):
        counted = targets != loss_function.ignore_index
        if loss_function.weight is None:
            return counted.sum().double()
        weights = loss_function.weight[targets.clamp(min=0)]
        return torch.where(counted, weights, torch.zeros_like(weights)).sum().double()
    return float(num_examples(batch))
