"""Convolutional networks of the literature on generated images: their shapes, without a download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hfdist.errors import TaskError
from hfdist.tasks.task import Batch, Outputs, Task


class GeneratedImages(Dataset[tuple[Tensor, int]]):
    """Images of classes: a smooth pattern a class, with noise. An image is made when it is asked for.

    Args:
        number: Length.
        shape: (channels, height, width).
        classes: Number of classes.
        first: Number of the first image; other numbers are other images.
    """

    def __init__(
        self, number: int, shape: tuple[int, int, int], classes: int, first: int = 0
    ) -> None:
        self._number, self._shape, self._classes, self._first = number, shape, classes, first
        generator = torch.Generator().manual_seed(5)
        coarse = torch.randn(classes, shape[0], 4, 4, generator=generator)
        self._patterns = nn.functional.interpolate(coarse, shape[1:], mode="bilinear")

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self._number:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self._first + index)
        label = (self._first + index) % self._classes
        return self._patterns[label] + torch.randn(self._shape, generator=generator), label


class _Images(Task):
    shape: tuple[int, int, int]

    def __init__(self, examples: int, evaluation: int, classes: int) -> None:
        if min(examples, classes) < 1 or evaluation < 0:
            raise TaskError(
                "task_args: examples and classes must be at least 1, evaluation at least 0"
            )
        self._sizes, self._classes = (examples, evaluation), classes

    def train_data(self) -> GeneratedImages:
        return GeneratedImages(self._sizes[0], self.shape, self._classes)

    def eval_data(self) -> GeneratedImages | None:
        n = self._sizes[1]
        return GeneratedImages(n, self.shape, self._classes, first=10**6) if n else None

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def metrics(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(-1) == batch[1]).float().mean()}


class AllCNNC(_Images):
    """All-CNN-C [Springenberg et al. 2015] on 3 x 32 x 32, 1.39 million parameters for 100 classes.

    Args:
        examples, evaluation: Number of images.
        classes: Number of classes.
        dropout: Whether to drop inputs (0.2) and units (0.5), as published.
    """

    shape = (3, 32, 32)

    def __init__(
        self, examples: int = 256, evaluation: int = 64, classes: int = 100, dropout: bool = False
    ) -> None:
        super().__init__(examples, evaluation, classes)
        self._dropout = dropout

    def model(self) -> nn.Module:
        return all_cnn_c(self._classes, dropout=self._dropout)


def all_cnn_c(
    classes: int, *, dropout: bool = False, widths: Sequence[int] = (96, 192)
) -> nn.Module:
    """The network: nine convolutions, two of them with stride 2, and a global average."""
    a, b = widths

    def conv(i: int, o: int, kernel: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(i, o, kernel, stride, padding), nn.ReLU()]

    return nn.Sequential(
        *([nn.Dropout(0.2)] if dropout else []),
        *conv(3, a, 3),
        *conv(a, a, 3),
        *conv(a, a, 3, stride=2),
        *([nn.Dropout(0.5)] if dropout else []),
        *conv(a, b, 3),
        *conv(b, b, 3),
        *conv(b, b, 3, stride=2),
        *([nn.Dropout(0.5)] if dropout else []),
        *conv(b, b, 3, padding=0),
        *conv(b, b, 1, padding=0),
        *conv(b, classes, 1, padding=0),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class ResNet18(_Images):
    """ResNet-18 [He et al. 2016] on 1 x 28 x 28, its first convolution with stride 1 and without pooling.

    Args:
        examples, evaluation: Number of images.
        classes: Number of classes.
    """

    shape = (1, 28, 28)

    def __init__(self, examples: int = 128, evaluation: int = 32, classes: int = 10) -> None:
        super().__init__(examples, evaluation, classes)

    def model(self) -> nn.Module:
        return small_resnet18(self._classes)


def small_resnet18(classes: int, width: int = 64) -> nn.Module:
    """The network for images of one channel: a first convolution of stride 1, no pooling after it.

    Args:
        classes: Number of outputs.
        width: Channels of its first stage, doubled at each of the three others; 64 as published.
    """
    from torchvision.models import resnet18

    model = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    if width != 64:
        _narrow(model, width / 64)
    return model


def _narrow(model: nn.Module, part: float) -> None:
    """Let every layer have this part of its channels, drawn anew as torchvision draws them."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            new: nn.Module
            if isinstance(layer, nn.Conv2d):
                inputs = 1 if layer.in_channels == 1 else round(part * layer.in_channels)
                convolution = nn.Conv2d(
                    inputs,
                    round(part * layer.out_channels),
                    layer.kernel_size,  # type: ignore[arg-type]
                    layer.stride,  # type: ignore[arg-type]
                    layer.padding,  # type: ignore[arg-type]
                    bias=False,
                )
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                new = convolution
            elif isinstance(layer, nn.BatchNorm2d):
                new = nn.BatchNorm2d(round(part * layer.num_features))
            elif isinstance(layer, nn.Linear):
                new = nn.Linear(round(part * layer.in_features), layer.out_features)
            else:
                continue
            setattr(parent, name, new)
