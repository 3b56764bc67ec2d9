"""Patches of real photographs that scikit-learn and matplotlib ship."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.images import all_cnn_c
from hfdist.tasks.task import Batch, Outputs, Task

SIDE = 32
"""Of a patch, in pixels."""


@cache
def _photographs() -> tuple[Tensor, ...]:
    """A temple, a flower and a portrait, [3, height, width] each, in [0, 1]."""
    from matplotlib import cbook, image
    from sklearn.datasets import load_sample_images

    portrait = image.imread(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    pictures = [*load_sample_images().images, portrait]
    return tuple(torch.tensor(p / 255.0, dtype=torch.float32).permute(2, 0, 1) for p in pictures)


def draw_patches(number: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Patches [number, 3, 32, 32], standardised, and labels [number]: a function of its arguments.

    The photographs are cut into vertical strips, a class each, evenly over their widths; a patch lies
    wholly in its strip.
    """
    photographs = _photographs()
    total = sum(p.shape[2] for p in photographs)
    strips: list[tuple[Tensor, int, int]] = []  # photograph, left, width
    for k, photograph in enumerate(photographs):
        width = photograph.shape[2]
        n = classes - len(strips) if k == len(photographs) - 1 else round(classes * width / total)
        n = max(n, 1)
        strips += [(photograph, width * j // n, width // n) for j in range(n)]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % len(strips)
    places = torch.rand(number, 2, generator=generator)
    patches = torch.empty(number, 3, SIDE, SIDE)
    for k, label in enumerate(labels.tolist()):
        photograph, left, width = strips[label]
        top = int(places[k, 0] * (photograph.shape[1] - SIDE + 1))
        left += int(places[k, 1] * (width - SIDE + 1))
        patches[k] = photograph[:, top : top + SIDE, left : left + SIDE]
    mean, std = patches.mean((0, 2, 3)), patches.std((0, 2, 3))
    return (patches - mean[:, None, None]) / std[:, None, None], labels


class PhotographsAllCNNC(Task):
    """All-CNN-C [Springenberg et al. 2015]: which part of which photograph is a patch from?

    Args:
        examples, evaluation: Number of patches; those of the evaluation overlap with the others.
        classes: Number of parts, 3 to 30.
        widths: Channels of the network's two stages.
        seed: Of the patches.
    """

    def __init__(
        self,
        examples: int = 2000,
        evaluation: int = 0,
        classes: int = 20,
        widths: tuple[int, int] = (96, 192),
        seed: int = 1,
    ) -> None:
        if not 3 <= classes <= 30:
            raise TaskError(f"task_args.classes is {classes}: it must be from 3 to 30")
        if examples < classes or evaluation < 0:
            raise TaskError(
                f"task_args: examples is {examples}, evaluation {evaluation}: at least one example a class, "
                "and none or more to evaluate"
            )
        self._sizes, self._classes, self._seed = (examples, evaluation), classes, seed
        self._widths = (int(widths[0]), int(widths[1]))

    def model(self) -> nn.Module:
        return all_cnn_c(self._classes, widths=self._widths)

    def train_data(self) -> ArrayData:
        return ArrayData(*draw_patches(self._sizes[0], self._classes, self._seed))

    def eval_data(self) -> ArrayData | None:
        n = self._sizes[1]
        return ArrayData(*draw_patches(n, self._classes, self._seed + 1_000_003)) if n else None

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def metrics(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(-1) == batch[1]).float().mean()}
