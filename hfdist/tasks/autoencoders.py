"""What autoencoders of images in [0, 1] have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hfdist.tasks.task import Batch, Outputs, Task


class PixelAutoencoder(Task):
    """Loss is the cross-entropy summed over pixels, mean over images; the metric `error` is the squared
    error summed over pixels, mean over images. A batch's first part is the images; outputs are logits."""

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, float]:
        pixels = batch[0]
        return nn.functional.binary_cross_entropy_with_logits(
            outputs, pixels, reduction="sum"
        ), float(len(pixels))

    def metrics(
        self, outputs: Outputs, batch: Batch
    ) -> dict[str, Tensor | tuple[Tensor, Tensor | float]]:
        return {"error": (torch.sigmoid(outputs) - batch[0]).square().sum(-1).mean()}


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """widths[0] - ... - widths[-1] - ... - widths[0], logistic units but a linear code; its outputs are
    logits of the inputs."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Sigmoid()]
    layers.pop()  # the code is linear
    for a, b in pairwise(list(reversed(widths))):
        layers += [nn.Linear(a, b), nn.Sigmoid()]
    layers.pop()  # the loss takes logits
    return nn.Sequential(*layers)


@torch.no_grad()
def initialise_sparsely(model: nn.Module, incoming: int) -> None:
    """[Martens 2010, sec. 5]: `incoming` random weights of each unit are N(0, 1), the rest is zero."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.bias.zero_()
            layer.weight.zero_()
            for row in layer.weight:
                indices = torch.randperm(len(row))[:incoming]
                row[indices] = torch.randn(len(indices))
