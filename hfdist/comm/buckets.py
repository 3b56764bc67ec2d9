"""A vector [P] that is summed over ranks in pieces, each as soon as it is final."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of the vector."""

    start: int
    stop: int
    tensors: frozenset[int]
    """Numbers of the tensors in it."""


def buckets(spans: Sequence[tuple[int, int]], least: int) -> list[Bucket]:
    """Buckets that cover the vector without gaps, built from the end, where a backward pass begins.

    Args:
        spans: (start, stop) of each tensor in the vector.
        least: Elements of the smallest bucket, except the first one; its ends are those of tensors.
    """
    found: list[Bucket] = []
    stop, tensors = spans[-1][1], set[int]()
    for k in reversed(range(len(spans))):
        start = spans[k][0]
        tensors.add(k)
        if stop - start >= least or k == 0:
            found.append(Bucket(start, stop, frozenset(tensors)))
            stop, tensors = start, set()
    return found[::-1]


class InOrder:
    """Starts the buckets' reductions from the last to the first, whatever order they are filled in:
    the ranks must agree on the order, and a rank without examples fills none.

    Args:
        buckets: Covering [P].
        local: The vector [P], and scalars behind it that are summed with its last bucket.
        start: Starts the reduction of a piece of `local`.
    """

    def __init__(
        self, buckets: Sequence[Bucket], local: Tensor, start: Callable[[Tensor], None]
    ) -> None:
        self._waiting = [
            (bucket, set(bucket.tensors)) for bucket in buckets
        ]  # the next one is last
        self._local, self._start = local, start
        self._stop = local.numel()

    def filled(self, k: int) -> None:
        """Tensor k's part of the vector is final."""
        for _, tensors in self._waiting:
            tensors.discard(k)
        while self._waiting and not self._waiting[-1][1]:
            self._start_next()

    def flush(self) -> None:
        """All of the vector is final."""
        while self._waiting:
            self._start_next()

    def _start_next(self) -> None:
        bucket, _ = self._waiting.pop()
        self._start(self._local[bucket.start : self._stop])
        self._stop = bucket.start
