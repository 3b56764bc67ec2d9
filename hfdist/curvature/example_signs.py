"""Random signs that belong to examples: the same however a batch is cut into microbatches and ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hfdist.seeds import mixed

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd: steps through all 64-bit numbers
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def example_seeds(seed: int, examples: Tensor) -> Tensor:
    """A seed for every example, int64 [n].

    Args:
        seed: Of the step.
        examples: What tells an example from others, whatever microbatch it is in, int64 [n].
    """
    return _scrambled(examples * _GOLDEN + mixed(seed, "examples"))


def signs_like(x: Tensor, seeds: Tensor, salt: int) -> Tensor:
    """Independent +1 and -1 in the shape of x.

    Args:
        x: A tensor of n examples (see `of_examples`).
        seeds: One an example, [n].
        salt: Tells apart the tensors of one step.
    """

    def signs(x: Tensor, n: int) -> Tensor:
        own = seeds[:n].to(x.device)
        m = x.numel() // n
        counter = torch.arange(-(-m // 64), device=x.device) + (salt + 1) * 2**32
        words = _scrambled(own[:, None] + counter * _GOLDEN)  # [n, ceil(m / 64)]
        shifts = torch.arange(8, dtype=torch.uint8, device=x.device)
        bits = (words.view(torch.uint8)[:, :, None] >> shifts) & 1  # [n, 8 * words, 8]
        return bits.view(n, -1)[:, :m].reshape(x.shape).to(x.dtype).mul_(2).sub_(1)

    return of_examples(x, len(seeds), signs)


def of_examples(x: Tensor, n: int, make: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A tensor in the shape of x that is made example by example.

    Args:
        x: Of n examples: [n, ..], flattened [n * T, ..], or [T, n, ..]; another shape counts as one example.
        n: Number of the examples.
        make: (x with the examples in front, or one after the other, their number) -> a tensor of its shape.
    """
    if x.numel() == 0 or n == 0:
        return torch.ones_like(x)
    if x.ndim > 1 and x.shape[0] != n and x.shape[1] == n:
        return make(x.transpose(0, 1), n).transpose(0, 1)
    return make(x, 1 if x.ndim == 0 or x.shape[0] % n else n)


def _scrambled(x: Tensor) -> Tensor:
    """Steele, Lea & Flood 2014, SplitMix64: every bit of the result depends on every bit of x [..]."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS):
        x = (x ^ _shifted(x, shift)) * multiplier
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """Towards the right, with zeros from the left."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)
