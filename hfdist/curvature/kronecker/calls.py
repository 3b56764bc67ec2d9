"""What one call of a layer says of the curvature: the sums that it adds to, of its input and of g, the
derivative of the outputs' random vector in its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hfdist.curvature.kronecker.factors import Factor, block_shape
from hfdist.curvature.kronecker.keys import KroneckerKey, Rows, VectorKey
from hfdist.curvature.outputs import Edge

CHUNK = 2**24
"""Numbers of unfolded inputs that are held at a time."""
MAX_VECTOR = 512
"""Most numbers of gains and biases whose block is a full matrix."""

Uses = Iterator[tuple[Tensor, Tensor]]
"""Inputs and g of a layer's uses, T of each of n examples: [n, T, groups * in] and [n, T, groups * out]; of
one-hot inputs the indices [n, T]."""


@dataclass(kw_only=True)
class LayerSums:
    """Sums over the uses of a layer."""

    A: Factor
    """Of aa', a the input with a 1 at its end, unless it is one-hot."""
    G: Factor
    """Of gg'."""
    uses: Tensor
    """Number of the uses that the outputs depend on, [1]."""

    @classmethod
    def zeros(cls, key: KroneckerKey, like: Tensor) -> LayerSums:
        """Sums over nothing."""

        def factor(n: int) -> Factor:
            number, size = block_shape(n)
            return Factor(blocks=like.new_zeros(key.groups, number, size, size), n=n)

        if key.is_one_hot:
            A = Factor.of_diagonal(like.new_zeros(key.num_inputs))
        else:
            A = factor(key.num_inputs + 1)
        return cls(A=A, G=factor(key.num_outputs), uses=like.new_zeros(1))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.A.blocks, self.G.blocks, self.uses]

    def add(self, key: KroneckerKey, x: Tensor, g: Tensor) -> None:
        """Add uses (see `Uses`)."""
        dtype = self.uses.dtype
        x, g = x.flatten(0, 1), g.flatten(0, 1).to(dtype)
        # What nothing depends on (padding) has no part in the curvature.
        counts = (g != 0).any(1).to(dtype)  # [R]
        if key.is_one_hot:
            self.A.blocks.view(-1).index_add_(0, x, counts)
        else:
            a = F.pad(x.to(dtype).view(len(x), key.groups, -1), (0, 1), value=1.0)
            a = a * counts[:, None, None]
            self.A.blocks.add_(Factor.of_rows(a.flatten(1), key.groups).blocks)
        self.G.blocks.add_(Factor.of_rows(g, key.groups).blocks)
        self.uses.add_(counts.sum())


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """A call of a layer with a weight."""

    key: KroneckerKey
    bias: Rows | None
    output: Edge
    uses: Callable[[Tensor], Uses]
    """g -> the call's uses, in one or several pieces."""


@dataclass(frozen=True, kw_only=True)
class VectorCall:
    """A call of an operation with parameters that act element by element."""

    key: VectorKey
    output: Edge
    rows: Callable[[Tensor], list[Tensor]]
    """g -> each parameter's part of J's, a row an example [N, numel]; where only the diagonal is known, the
    sum of its squares, shaped like the parameter."""


def vector_blocks(key: VectorKey, like: Tensor) -> Tensor:
    """Zeros: [1, m, m] for all numbers of few parameters, [C, k, k] for those that belong together."""
    k, numel = len(key.params), key.numel
    if key.is_diagonal or k * numel > MAX_VECTOR:
        return like.new_zeros(numel, k, k)
    return like.new_zeros(1, k * numel, k * numel)


@dataclass(kw_only=True)
class VectorRows:
    """J's of a microbatch's examples: calls with the same parameters add up before they are squared."""

    calls: list[list[Tensor]] = field(default_factory=list)

    def add_to(self, blocks: Tensor, key: VectorKey) -> None:
        """Add the outer products of the examples' rows."""
        if key.is_diagonal:
            for (squares,) in self.calls:
                blocks.view(-1).add_(squares.reshape(-1).to(blocks))
            return
        for rows in summed(self.calls):
            flat = [row.to(blocks) for row in rows]  # each [N, numel]
            if len(blocks) == 1:
                J = torch.cat(flat, 1)
                blocks[0].add_(J.T @ J)
            else:
                J = torch.stack(flat, 2).transpose(0, 1)  # [C, N, k]
                blocks.add_(J.mT @ J)


def vector_rows(pulled: Sequence[tuple[VectorCall, Tensor]]) -> dict[VectorKey, VectorRows]:
    """Rows of calls and g, by key."""
    found: dict[VectorKey, VectorRows] = {}
    for call, g in pulled:
        found.setdefault(call.key, VectorRows()).calls.append(call.rows(g))
    return found


def summed(calls: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """Rows of calls on equally many examples, added."""
    found: dict[int, list[Tensor]] = {}
    for rows in calls:
        n = len(rows[0])
        found[n] = [a + b for a, b in zip(found[n], rows)] if n in found else list(rows)
    return list(found.values())


# -- uses of layers ----------------------------------------------------------------------------------


def by_example(t: Tensor, n: int | None, time_first: bool = False) -> Tensor:
    """[.., C] as [n, T, C]: examples are the first axis, or the second one, or runs of the first one; as
    [1, T, C] where none of that fits.

    Args:
        t: Of uses.
        n: Number of the examples; None: the first axis.
        time_first: The first axis is time, or runs over the examples at each time.
    """
    if time_first and n and t.ndim == 2 and t.shape[0] % n == 0:
        t = t.unflatten(0, (-1, n))
    if t.ndim > 2 and n is not None and (time_first or t.shape[0] != n) and t.shape[1] == n:
        t = t.transpose(0, 1)
    rows = t.shape[0] if n is None else n
    if t.ndim < 2 or rows == 0 or t.shape[0] % rows:
        rows = 1
    return t.reshape(rows, -1, t.shape[-1])


def linear_uses(x: Tensor, n: int | None, time_first: bool = False) -> Callable[[Tensor], Uses]:
    """Inputs [.., in] and g [.., out]."""

    def uses(g: Tensor) -> Uses:
        yield by_example(x, n, time_first), by_example(g, n, time_first)

    return uses


def embedding_uses(ids: Tensor, padding_idx: int | None, n: int | None) -> Callable[[Tensor], Uses]:
    """Indices [..] and g [.., out]; the row of the padding has no gradient."""

    def uses(g: Tensor) -> Uses:
        if padding_idx is not None:
            g = g * (ids != padding_idx)[..., None].to(g.dtype)
        yield by_example(ids[..., None], n)[..., 0], by_example(g, n)

    return uses


def reduced(uses: Callable[[Tensor], Uses]) -> Callable[[Tensor], Uses]:
    """The setting "reduce": of an example's uses, the mean input and the sum of g."""

    def mean_uses(g: Tensor) -> Uses:
        for a, y in uses(g):
            yield a.mean(1, keepdim=True), y.sum(1, keepdim=True)

    return mean_uses


def convolution_uses(x: Tensor, window: Window, groups: int) -> Callable[[Tensor], Uses]:
    """Patches of x [N, in, ..] and g [N, out, ..]; a use is a position."""

    def uses(g: Tensor) -> Uses:
        for low, high in window.chunks(x):
            yield window.patches(x[low:high], groups), g[low:high].flatten(2).mT

    return uses


def transposed_convolution_uses(x: Tensor, window: Window, groups: int) -> Callable[[Tensor], Uses]:
    """x [N, in, ..], and the patches of g [N, out, ..] that a position of it is written to."""

    def uses(g: Tensor) -> Uses:
        for low, high in window.chunks(g):
            places = x[low:high].flatten(2).mT  # [n, L, in]
            yield places, window.patches(g[low:high], groups, count=x.shape[2:])

    return uses


@dataclass(frozen=True, kw_only=True)
class Window:
    """Geometry of a convolution, a number a spatial axis."""

    size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[tuple[int, int]]
    dilation: Sequence[int]

    def chunks(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """Ranges of examples whose patches are held at a time."""
        each = max(1, x[0].numel() * torch.Size(self.size).numel() if len(x) else 1)
        step = max(1, CHUNK // each)
        for low in range(0, len(x), step):
            yield low, min(low + step, len(x))

    def patches(self, x: Tensor, groups: int, count: Sequence[int] | None = None) -> Tensor:
        """[N, L, groups * in * K] of x [N, groups * in, ..], in the order of a weight's elements."""
        n, channels = x.shape[:2]
        dims = len(self.size)
        x = F.pad(x, [p for pair in reversed(self.padding) for p in pair])
        for axis in range(dims):
            reach = self.dilation[axis] * (self.size[axis] - 1) + 1
            x = x.unfold(2 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
            if count is not None:
                x = x.narrow(2 + axis, 0, count[axis])
        # [N, channels, *L, *K] -> [N, *L, channels, *K]; groups are runs of channels.
        x = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        return x.reshape(n, -1, channels * torch.Size(self.size).numel())


# -- rows of element-wise operations -------------------------------------------------------------------


def per_example(t: Tensor, shape: Sequence[int], n: int | None) -> Tensor:
    """Sum of t over what a parameter of this shape is broadcast along, but for the examples: [N, *shape].

    Args:
        t: [N, .., *shape], flattened [N * T, *shape], or [T, N, *shape]; another one counts as one example.
        shape: Aligned with the last axes of t; 1 where it is broadcast.
        n: Number of the examples; None: the first axis.
    """
    shape = list(shape)
    full = [1] * (t.ndim - len(shape)) + shape
    n = t.shape[0] if n is None and t.ndim else n
    free = [axis for axis, size in enumerate(full) if size == 1]
    axis = next((a for a in (0, 1) if a in free and a < t.ndim and t.shape[a] == n), None)
    if axis is None and 0 in free and n and t.shape[0] % n == 0:
        t, full, axis = t.unflatten(0, (n, -1)), [1, *full], 0
        free = [axis for axis, size in enumerate(full) if size == 1]
    summed = [a for a in free if a != axis]
    if summed:
        t = t.sum(summed, keepdim=True)
    t = t.movedim(axis, 0) if axis is not None else t.unsqueeze(0)
    return t.reshape(t.shape[0], *shape)
