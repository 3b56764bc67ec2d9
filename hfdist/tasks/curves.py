"""CURVES-R: images of random quadratic curves, a regenerated stand-in for the CURVES data set.

The original [Hinton & Salakhutdinov 2006] can no longer be generated exactly; numbers on this one are
never comparable with numbers published for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hfdist.errors import TaskError
from hfdist.tasks.array_data import ArrayData
from hfdist.tasks.autoencoders import PixelAutoencoder, autoencoder, initialise_sparsely

SIDE = 28
_LOW, _HIGH = 6.0, 21.0  # where the three points may lie, in pixels
_WIDTH = 0.7  # of the pen, in pixels
_SAMPLES = 200
_CHUNK = 250  # images drawn at once: 250 * 200 * 784 distances


def draw_curves(number: int, seed: int) -> Tensor:
    """Images [number, 784] in [0, 1], a function of number and seed.

    A curve is the quadratic through three points of U[6, 21]^2 at t = 0, 1/2, 1, sampled 200 times; a
    pixel is max_t exp(-d^2 / (2 * 0.7^2)), d its distance from the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0.0, 1.0, _SAMPLES)
    # Lagrange's polynomials for nodes 0, 1/2, 1.
    basis = torch.stack((2 * (t - 0.5) * (t - 1), -4 * t * (t - 1), 2 * t * (t - 0.5)))  # [3, T]
    grid = torch.arange(SIDE, dtype=torch.float32)
    images = []
    for start in range(0, number, _CHUNK):
        n = min(_CHUNK, number - start)
        points = _LOW + (_HIGH - _LOW) * torch.rand(n, 3, 2, generator=generator)
        xy = torch.einsum("npc,pt->nct", points, basis)  # [n, 2, T]
        # exp(-d^2) is the product of its two axes: no [n, T, 28, 28] of squares.
        along = torch.exp(-((xy[..., None] - grid) ** 2) / (2 * _WIDTH**2))  # [n, 2, T, 28]
        image = torch.zeros(n, SIDE, SIDE)
        for k in range(_SAMPLES):
            torch.maximum(image, along[:, 1, k, :, None] * along[:, 0, k, None, :], out=image)
        images.append(image.reshape(n, SIDE * SIDE))
    return torch.cat(images)


class Curves(PixelAutoencoder):
    """The deep autoencoder of Hinton & Salakhutdinov 2006 and Martens 2010 on CURVES-R.

    Loss is the cross-entropy summed over pixels, mean over images; `error` is the squared error summed
    over pixels, mean over images.

    Args:
        train: Number of training images.
        evaluation: Number of evaluation images.
        widths: Widths of the encoder; the last is the code.
        sparse: Incoming weights of a unit at the start [Martens 2010, sec. 5].
        seed: Of the images.
    """

    def __init__(
        self,
        train: int = 20_000,
        evaluation: int = 10_000,
        widths: Sequence[int] = (400, 200, 100, 50, 25, 6),
        sparse: int = 15,
        seed: int = 1,
    ) -> None:
        if train < 1 or evaluation < 0:
            raise TaskError(f"task_args: train is {train}, evaluation {evaluation}: too few images")
        self._sizes, self._widths, self._sparse, self._seed = (
            (train, evaluation),
            list(widths),
            sparse,
            seed,
        )

    def model(self) -> nn.Module:
        model = autoencoder([SIDE * SIDE, *self._widths])
        if self._sparse:
            initialise_sparsely(model, self._sparse)
        return model

    def train_data(self) -> ArrayData:
        return ArrayData(draw_curves(self._sizes[0], self._seed))

    def eval_data(self) -> ArrayData | None:
        n = self._sizes[1]
        return ArrayData(draw_curves(n, self._seed + 1_000_003)) if n else None
