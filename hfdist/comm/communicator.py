"""What ranks say to each other. Alone, every collective is the identity: one code path for both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Communicator(Protocol):
    """Collectives of a run. Every method but the properties and `take_counters` is collective: all
    ranks call it, in the same order. Counts its own calls, bytes and seconds."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank's decisions bind the others (rank 0)."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; bitwise equal on all of them. Returns `tensor`."""
        ...

    def overlapped_all_reduce(self) -> AbstractContextManager[Callable[[Tensor], None]]:
        """A sum in buckets that runs beside the computation. The context gives `start(bucket)`; on
        leaving it every started bucket holds its sum over ranks. One sum in the counters.

        Ranks start the same buckets in the same order: a fixed layout, so that bits do not depend on
        timing. A bucket must be contiguous and is not touched until the context is left.
        """
        ...

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value (any small picklable object), on every rank."""
        ...

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value (a small picklable object), in rank order, on every rank."""
        ...

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        ...

    # Sharded vectors: rank r holds elements [r * n, (r + 1) * n) of the vector padded to W * n.
    def shard_size(self, numel: int) -> int:
        """n = ceil(numel / W)."""
        ...

    def reduce_scatter(self, vector: Tensor) -> Tensor:
        """Reduce-scatter: this rank's shard [n] of the sum over ranks of `vector` [P], zero padded."""
        ...

    def all_gather(self, shard: Tensor, numel: int) -> Tensor:
        """All-gather: the whole vector [numel] of the ranks' shards [n]."""
        ...

    def take_counters(self) -> dict[str, float]:
        """Calls, bytes and seconds by kind of collective since the last take; resets them.

        {"sum_calls": .., "sum_bytes": .., "sum_seconds": .., "object_calls": .., ..., "seconds": ..};
        kinds: sum, object, reduce_scatter, all_gather, barrier. `vector_sums` and `scalar_sums` divide
        the sums at 64 elements. Seconds are the host's: work queued on a GPU is not waited for.
        Empty when alone."""
        ...

    def close(self) -> None:
        """Leave the group. Not collective."""
        ...


class SerialCommunicator:
    """World size one: every collective is the identity."""

    rank = 0
    world_size = 1
    is_rank_0 = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def overlapped_all_reduce(self) -> AbstractContextManager[Callable[[Tensor], None]]:
        return nullcontext(lambda bucket: None)

    def broadcast_object(self, value: T) -> T:
        return value

    def all_gather_object(self, value: T) -> list[T]:
        return [value]

    def barrier(self) -> None:
        pass

    def shard_size(self, numel: int) -> int:
        return numel

    def reduce_scatter(self, vector: Tensor) -> Tensor:
        return vector

    def all_gather(self, shard: Tensor, numel: int) -> Tensor:
        return shard

    def take_counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
