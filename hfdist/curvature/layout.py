"""How the solver's vectors lie over the ranks, and the damped products of such vectors.

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
from hfdist.comm.buckets import InOrder, buckets
from hfdist.curvature.params import ParameterVector
from hfdist.optim.objective import Operator
from hfdist.optim.options import HFOptions


class Product(Protocol):
    """A matrix B, seen through its product."""

    overlaps: bool
    """Whether the parameters' gradient hooks fire only for the result, so that a piece of it can be used
    before the rest is there."""

    def __call__(self, v: Sequence[Tensor], factor: float = 1.0) -> Sequence[Tensor | None]:
        """factor * Bv, shaped like the parameters, for v shaped like them; None stands for zero."""
        ...


class SummedProduct(Protocol):
    """B = factor * (sum over ranks of their products)."""

    signal: Tensor
    """What `abort_flag` said when the last product was made: its sum over ranks, or with parts this rank's
    own, which is to be summed with the solver's next scalars."""

    def damped(self, shift: float | Tensor, exact: bool = False) -> Operator:
        """v [n] -> (B + diag(shift)) v [n]: one vector reduction a product.

        Args:
            shift: A scalar, or this rank's part of a diagonal.
            exact: Without rounding on the wire.
        """
        ...


class Layout(Protocol):
    """Ways between whole vectors and this rank's parts, and products of parts. All but `part` and
    `summed` are collective."""

    is_sharded: bool
    """Whether `total` costs a reduction."""

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

    def summed(
        self, products: Sequence[Product], factor: float, abort_flag: Callable[[], float]
    ) -> SummedProduct:
        """The ranks' products as one matrix.

        Args:
            products: This rank's.
            factor: On each.
            abort_flag: Asked with every product; 1 on a rank that asks to abandon the step.
        """
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

    is_sharded = False

    def __init__(
        self,
        params: ParameterVector,
        comm: Communicator,
        bucket_bytes: int = 2**20,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.params, self.comm, self.dtype = params, comm, dtype
        self.buckets = buckets(params.spans, -(-bucket_bytes // params.dtype.itemsize))

    def part(self, whole: Tensor) -> Tensor:
        return whole

    def whole(self, part: Tensor) -> Tensor:
        return part

    def sum_to_part(self, local: Tensor) -> Tensor:
        return self.comm.all_reduce(local)

    def total(self, scalars: Tensor) -> Tensor:
        return scalars

    def summed(
        self, products: Sequence[Product], factor: float, abort_flag: Callable[[], float]
    ) -> SummedProduct:
        return _ReplicatedSum(self, products, factor, abort_flag)


class _ReplicatedSum:
    """A `SummedProduct` of whole vectors; the abort flag travels behind the vector."""

    def __init__(
        self,
        layout: Replicated,
        products: Sequence[Product],
        factor: float,
        abort_flag: Callable[[], float],
    ) -> None:
        self._layout, self._params, self._comm = layout, layout.params, layout.comm
        self._products, self._factor, self._abort_flag = list(products), factor, abort_flag
        self._buffer = torch.zeros(
            self._params.numel + 1, dtype=self._params.dtype, device=self._params.device
        )
        self._out, self.signal = self._buffer[:-1], self._buffer[-1]

    def damped(self, shift: float | Tensor, exact: bool = False) -> Operator:
        if len(self._products) == 1 and self._comm.world_size == 1:
            return lambda v: self._alone(v, shift)

        def B(v: Tensor) -> Tensor:
            self._sum(self._params.views(v), exact)
            return add_scaled(self._out, shift, v)

        return B

    def _alone(self, v: Tensor, shift: float | Tensor) -> Tensor:
        # One product on one rank: a single pass puts it into place, shifted.
        results = self._products[0](self._params.views(v), self._factor)
        self.signal.fill_(self._abort_flag())
        return self._params.flatten_shifted(results, v, shift, self._out)

    def _sum(self, v: Sequence[Tensor], exact: bool) -> None:
        """The buffer holds the products' sum over ranks, and the flags'."""
        self._buffer.zero_()
        # The last one's results are reduced while it goes on, if they can be told from others.
        overlaps = bool(self._products) and self._products[-1].overlaps
        at_once, last = self._products, None
        if overlaps and self._comm.world_size > 1:
            at_once, last = self._products[:-1], self._products[-1]
        for product in at_once:
            self._params.add(self._out, product(v, self._factor))
        self.signal.fill_(self._abort_flag())
        with self._reduction(exact) as in_order:
            if last is not None:
                self._add_overlapped(last, v, in_order)
            in_order.flush()

    def _add_overlapped(self, product: Product, v: Sequence[Tensor], in_order: InOrder) -> None:
        pieces = [
            self._out[start:stop].view(t.shape)
            for (start, stop), t in zip(self._params.spans, self._params.tensors)
        ]
        with _when_ready(self._params.tensors, pieces, in_order) as added:
            results = product(v, self._factor)
        for k, result in enumerate(results):
            if result is not None and k not in added:
                pieces[k].add_(result)

    @contextmanager
    def _reduction(self, exact: bool) -> Iterator[InOrder]:
        """Buckets that are filled inside hold their sums over ranks afterwards."""
        dtype = None if exact else self._layout.dtype
        rounded: list[tuple[Tensor, Tensor]] = []
        with self._comm.overlapped_all_reduce() as start:

            def start_rounded(bucket: Tensor) -> None:
                rounded.append((bucket, bucket.to(dtype)))
                start(rounded[-1][1])

            yield InOrder(
                self._layout.buckets, self._buffer, start if dtype is None else start_rounded
            )
        for bucket, total in rounded:
            bucket.copy_(total)


class Sharded:
    """Every rank holds 1/W of each solver vector: a reduce-scatter and an all-gather a product, and
    one packed scalar reduction an iteration.

    Args:
        params: The trainable tensors.
        comm: The ranks.
        dtype: Products are rounded to it on the wire; None: as they are.
    """

    is_sharded = True

    def __init__(
        self, params: ParameterVector, comm: Communicator, dtype: torch.dtype | None = None
    ) -> None:
        self.params, self.comm, self.dtype = params, comm, dtype

    def part(self, whole: Tensor) -> Tensor:
        n = self.comm.shard_size(self.params.numel)
        mine = whole[self.comm.rank * n : (self.comm.rank + 1) * n]
        return torch.nn.functional.pad(mine, (0, n - mine.numel())) if mine.numel() < n else mine

    def whole(self, part: Tensor) -> Tensor:
        return self.comm.all_gather(part, self.params.numel)

    def sum_to_part(self, local: Tensor) -> Tensor:
        return self.comm.reduce_scatter(local)

    def total(self, scalars: Tensor) -> Tensor:
        return self.comm.all_reduce(scalars)

    def summed(
        self, products: Sequence[Product], factor: float, abort_flag: Callable[[], float]
    ) -> SummedProduct:
        return _ShardedSum(self, products, factor, abort_flag)


class _ShardedSum:
    """A `SummedProduct` of parts."""

    def __init__(
        self,
        layout: Sharded,
        products: Sequence[Product],
        factor: float,
        abort_flag: Callable[[], float],
    ) -> None:
        self._layout, self._params = layout, layout.params
        self._products, self._factor, self._abort_flag = list(products), factor, abort_flag
        self._local = self._params.zeros()
        self.signal = torch.zeros((), dtype=torch.float64, device=self._params.device)

    def damped(self, shift: float | Tensor, exact: bool = False) -> Operator:
        layout, local = self._layout, self._local

        def B(v: Tensor) -> Tensor:
            views = self._params.views(layout.whole(v))
            local.zero_()
            for product in self._products:
                self._params.add(local, product(views, self._factor))
            self.signal.fill_(self._abort_flag())
            in_full = exact or layout.dtype is None
            part = layout.sum_to_part(local if in_full else local.to(layout.dtype))
            return add_scaled(part.to(local.dtype), shift, v)

        return B


def make_layout(params: ParameterVector, comm: Communicator, options: HFOptions) -> Layout:
    """The layout that `shard_solver_state` and `reduction_dtype` ask for; alone, a rank holds everything
    anyway."""
    dtype = torch.bfloat16 if options.reduction_dtype == "bfloat16" else None
    if options.shard_solver_state and comm.world_size > 1:
        return Sharded(params, comm, dtype)
    return Replicated(params, comm, dtype=dtype)


def add_scaled(out: Tensor, factor: float | Tensor, v: Tensor) -> Tensor:
    """out += factor * v; factor is a scalar or a diagonal."""
    if isinstance(factor, Tensor):
        return out.addcmul_(factor, v)
    return out if factor == 0.0 else out.add_(v, alpha=factor)


@contextmanager
def _when_ready(
    tensors: Sequence[Tensor], pieces: Sequence[Tensor], in_order: InOrder
) -> Iterator[set[int]]:
    """Add each tensor's derivative to its piece the moment the backward pass has it.

    Yields the numbers of the tensors that were dealt with; autograd's hooks on leaves fire only for
    the pass that differentiates in them, which is the last of a product.
    """
    added: set[int] = set()

    def hook(k: int) -> Callable[[Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            if k not in added:
                added.add(k)
                pieces[k].add_(gradient.detach())
                in_order.filled(k)

        return on_gradient

    handles = [t.register_hook(hook(k)) for k, t in enumerate(tensors)]
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()
