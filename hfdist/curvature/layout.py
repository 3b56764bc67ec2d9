"""How the solver's vectors lie over the ranks: whole on each of them, or a part on each.

A vector "whole" is [P] and the same on every rank; a "part" is what a rank's solver works on: all of
it (`Replicated`), or the elements [r n, (r + 1) n) of it, zero padded, n = ceil(P / W) (`Sharded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from hfdist.comm import Communicator
from hfdist.curvature.params import ParameterVector
from hfdist.optim.options import HFOptions


class Product(Protocol):
    """A matrix B, seen through its product."""

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        """factor * Bv, shaped like the parameters, for v shaped like them; None stands for zero."""
        ...


class Layout(Protocol):
    """Ways between whole vectors and this rank's parts. All but `part` are collective."""

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole vector; a view where possible."""
        ...

    def whole(self, part: Tensor) -> Tensor:
        """The whole vector of the ranks' parts; do not write into it."""
        ...

    def sum_to_part(self, local: Tensor) -> Tensor:
        """This rank's part of the sum over ranks of vectors [P]; may use `local`'s memory."""
        ...

    def total(self, scalars: Tensor) -> Tensor:
        """Sums of what every rank computed from its parts (dot products); in place."""
        ...


class Replicated:
    """Every rank holds whole vectors: one vector reduction a product, no scalar one.

    Products are reduced in fixed buckets, each as soon as its part of the backward pass is done.

    Args:
        params: The trainable tensors.
        comm: The ranks.
        bucket_bytes: Least size of a bucket; its ends are those of parameters.
        dtype: Products are rounded to it on the wire; None: as they are.
    """

    def __init__(
        self,
        params: ParameterVector,
        comm: Communicator,
        bucket_bytes: int = 2**20,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._params, self._comm, self._dtype = params, comm, dtype
        self._buckets = _buckets(params, bucket_bytes)

    def part(self, whole: Tensor) -> Tensor:
        return whole

    def whole(self, part: Tensor) -> Tensor:
        return part

    def sum_to_part(self, local: Tensor) -> Tensor:
        return self._comm.all_reduce(local)

    def total(self, scalars: Tensor) -> Tensor:
        return scalars

    def add_and_sum(
        self,
        product: Product | None,
        v: Sequence[Tensor],
        factor: float,
        local: Tensor,
        exact: bool = False,
    ) -> None:
        """local [P + S] = sum over ranks of (local + product(v, factor)), reduced while the product goes
        on.

        Args:
            product: The last one of this rank; None if it has none.
            v: Shaped like the parameters.
            factor: Of the product.
            local: The sum so far [P], followed by S scalars that are summed along.
            exact: Without rounding on the wire.
        """
        if self._comm.world_size == 1:
            if product is not None:
                self._params.add(local[: self._params.numel], product(v, factor))
            return
        pieces = [
            local[start:stop].view(t.shape)
            for (start, stop), t in zip(self._params.spans, self._params.tensors)
        ]
        rounded: list[tuple[Tensor, Tensor]] = []
        with self._comm.overlapped_all_reduce() as start:

            def start_rounded(bucket: Tensor) -> None:
                rounded.append((bucket, bucket.to(self._dtype)))
                start(rounded[-1][1])

            in_full = exact or self._dtype is None
            ready = _InOrder(self._buckets, local, start if in_full else start_rounded)
            if product is not None:
                with _when_ready(self._params.tensors, pieces, ready) as added:
                    results = product(v, factor)
                for k, result in enumerate(results):
                    if result is not None and k not in added:
                        pieces[k].add_(result)
            ready.flush()
        for bucket, total in rounded:
            bucket.copy_(total)


class Sharded:
    """Every rank holds 1/W of each solver vector: a reduce-scatter and an all-gather a product, and
    one packed scalar reduction an iteration.

    Args:
        numel: P.
        comm: The ranks.
        dtype: Products are rounded to it on the wire; None: as they are.
    """

    def __init__(self, numel: int, comm: Communicator, dtype: torch.dtype | None = None) -> None:
        self._numel, self._comm, self._dtype = numel, comm, dtype

    def part(self, whole: Tensor) -> Tensor:
        n = self._comm.shard_size(self._numel)
        mine = whole[self._comm.rank * n : (self._comm.rank + 1) * n]
        return torch.nn.functional.pad(mine, (0, n - mine.numel())) if mine.numel() < n else mine

    def whole(self, part: Tensor) -> Tensor:
        return self._comm.all_gather(part, self._numel)

    def sum_to_part(self, local: Tensor) -> Tensor:
        return self._comm.reduce_scatter(local)

    def sum_product_to_part(self, local: Tensor, exact: bool = False) -> Tensor:
        """`sum_to_part`, rounded on the wire unless `exact`."""
        wire = local if exact or self._dtype is None else local.to(self._dtype)
        return self._comm.reduce_scatter(wire).to(local.dtype)

    def total(self, scalars: Tensor) -> Tensor:
        return self._comm.all_reduce(scalars)


def make_layout(
    params: ParameterVector, comm: Communicator, options: HFOptions
) -> Replicated | Sharded:
    """The layout that `shard_solver_state` and `reduction_dtype` ask for; alone, a rank holds everything
    anyway."""
    dtype = torch.bfloat16 if options.reduction_dtype == "bfloat16" else None
    if options.shard_solver_state and comm.world_size > 1:
        return Sharded(params.numel, comm, dtype)
    return Replicated(params, comm, dtype=dtype)


class _InOrder:
    """Starts the buckets' reductions from the last to the first, whatever order they are filled in:
    the ranks must agree on the order, and a rank without examples fills none."""

    def __init__(
        self,
        buckets: list[tuple[int, int, set[int]]],
        local: Tensor,
        start: Callable[[Tensor], None],
    ) -> None:
        self._waiting = [(a, b, set(members)) for a, b, members in buckets]  # the next one is last
        first, _, members = self._waiting[-1]
        self._waiting[-1] = (first, local.numel(), members)  # with the scalars behind the vector
        self._local, self._start = local, start

    def filled(self, k: int) -> None:
        """Tensor k's part of the vector is final."""
        for _, _, members in self._waiting:
            members.discard(k)
        while self._waiting and not self._waiting[-1][2]:
            a, b, _ = self._waiting.pop()
            self._start(self._local[a:b])

    def flush(self) -> None:
        """All of the vector is final."""
        while self._waiting:
            a, b, _ = self._waiting.pop()
            self._start(self._local[a:b])


@contextmanager
def _when_ready(
    tensors: Sequence[Tensor], pieces: Sequence[Tensor], ready: _InOrder
) -> Iterator[set[int]]:
    """Add each tensor's derivative to its piece the moment the backward pass has it.

    Yields the places of the tensors that were dealt with; autograd's hooks on leaves fire only for
    the pass that differentiates in them, which is the last of a product.
    """
    added: set[int] = set()

    def hook(k: int) -> Callable[[Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            if k not in added:
                added.add(k)
                pieces[k].add_(gradient.detach())
                ready.filled(k)

        return on_gradient

    handles = [t.register_hook(hook(k)) for k, t in enumerate(tensors)]
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


def _buckets(params: ParameterVector, least_bytes: int) -> list[tuple[int, int, set[int]]]:
    """(start, stop, places of the tensors in it), covering [P] without gaps, built from the end, where
    a backward pass begins."""
    itemsize = params.dtype.itemsize
    buckets: list[tuple[int, int, set[int]]] = []
    stop, members = params.numel, set[int]()
    for k in reversed(range(len(params.tensors))):
        start = params.spans[k][0]
        members.add(k)
        if (stop - start) * itemsize >= least_bytes or k == 0:
            buckets.append((start, stop, members))
            stop, members = start, set()
    return buckets[::-1]
