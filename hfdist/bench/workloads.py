"""The four models on which products and steps are timed: made-up data, real shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.tasks.task import Task, Weighted


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with one batch."""

    name: str
    description: str
    task: Task
    batch: Callable[[], Any]
    training: bool = True


class Autoencoder(Task):
    """784-1000-500-250-30 and back, logistic units, linear code; cross-entropy summed over pixels."""

    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for n_in, n_out in zip(self.widths, self.widths[1:]):
            layers += [nn.Linear(n_in, n_out)]
            layers += [] if n_out in (30, 784) else [nn.Sigmoid()]
        return nn.Sequential(*layers)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        losses = nn.functional.binary_cross_entropy_with_logits(outputs, batch[0], reduction="sum")
        return losses / len(outputs)


class AllCNNC(Task):
    """The all-convolutional network C on 3x32x32 images, 100 classes, 1.39M parameters."""

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for n_in, n_out, size, stride, padding in (
            (3, 96, 3, 1, 1), (96, 96, 3, 1, 1), (96, 96, 3, 2, 1),
            (96, 192, 3, 1, 1), (192, 192, 3, 1, 1), (192, 192, 3, 2, 1),
            (192, 192, 3, 1, 0), (192, 192, 1, 1, 0), (192, 100, 1, 1, 0),
        ):  # fmt: skip
            layers += [nn.Conv2d(n_in, n_out, size, stride, padding), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class ResNet18(Task):
    """torchvision's ResNet-18 on 3x64x64 images, 10 classes."""

    def model(self) -> nn.Module:
        from torchvision.models import resnet18

        return resnet18(num_classes=10)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class Transformer(Task):
    """A causal transformer on bytes: width 256, 4 layers, 8 heads, 3.2M parameters in its blocks."""

    vocabulary, width, depth, length = 1000, 256, 4, 128

    def model(self) -> nn.Module:
        return CausalTransformer(self.vocabulary, self.width, self.depth, 8, self.length)

    def loss(self, outputs: Any, batch: Any) -> Weighted:
        targets = batch[1].flatten()
        total = nn.functional.cross_entropy(outputs.flatten(0, 1), targets, reduction="sum")
        return total, float(targets.numel())


class CausalTransformer(nn.Module):
    """Pre-norm blocks over learned positions; the decoder's matrix is the embedding's."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]  # [batch, length, width]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention and a two-layer network, each on a normalised copy and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@contextmanager
def chosen(names: Sequence[str] | None, threads: int | None) -> Iterator[list[Workload]]:
    """The workloads of these names, all by default, with so many threads of torch's inside the block.

    Raises:
        ValueError: An unknown workload.
    """
    known = {w.name: w for w in workloads()}
    unknown = set(names or ()) - set(known)
    if unknown:
        raise ValueError(f"unknown workload {sorted(unknown)[0]!r}: choose from {', '.join(known)}")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield [known[name] for name in names or known]
    finally:
        torch.set_num_threads(before)


def workloads() -> list[Workload]:
    """The four, in the order of the tables."""
    return [
        Workload(
            name="autoencoder",
            description="autoencoder 784-1000-500-250-30, batch 512",
            task=Autoencoder(),
            batch=lambda: (torch.rand(512, 784).round(),),
        ),
        Workload(
            name="all-cnn-c",
            description="All-CNN-C, batch 32",
            task=AllCNNC(),
            batch=lambda: (torch.randn(32, 3, 32, 32), torch.randint(100, (32,))),
        ),
        Workload(
            name="resnet-18",
            description="ResNet-18, 64x64, batch 16, eval",
            task=ResNet18(),
            batch=lambda: (torch.randn(16, 3, 64, 64), torch.randint(10, (16,))),
            training=False,
        ),
        Workload(
            name="transformer",
            description="transformer, 3.4M, 8 x 128 tokens",
            task=Transformer(),
            batch=lambda: tuple(torch.randint(1000, (2, 8, 128)).unbind()),
        ),
    ]
