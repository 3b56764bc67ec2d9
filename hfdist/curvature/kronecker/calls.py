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

Pairs = Iterator[tuple[Tensor, Tensor]]


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
        """Add uses with inputs x [R, groups * in], or indices [R], and g [R, groups * out]."""
        dtype = self.uses.dtype
        g = g.to(dtype)
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
    pairs: Callable[[Tensor], Pairs]
    """g -> what `LayerSums.add` takes, in one or several pieces."""


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
        for rows in _summed(self.calls):
            flat = [row.to(blocks) for row in rows]  # each [N, numel]
            if len(blocks) == 1:
                J = torch.cat(flat, 1)
                blocks[0].add_(J.T @ J)
            else:
                J = torch.stack(flat, 2).transpose(0, 1)  # [C, N, k]
                blocks.add_(J.mT @ J)


def _summed(calls: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """Rows of calls on equally many examples, added."""
    found: dict[int, list[Tensor]] = {}
    for rows in calls:
        n = len(rows[0])
        found[n] = [a + b for a, b in zip(found[n], rows)] if n in found else list(rows)
    return list(found.values())


# -- rows of layers ----------------------------------------------------------------------------------


def linear_pairs(x: Tensor) -> Callable[[Tensor], Pairs]:
    """Inputs [.., in] and g [.., out]."""

    def pairs(g: Tensor) -> Pairs:
        yield x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])

    return pairs


def embedding_pairs(ids: Tensor, padding_idx: int | None) -> Callable[[Tensor], Pairs]:
    """Indices [..] and g [.., out]; the row of the padding has no gradient."""

    def pairs(g: Tensor) -> Pairs:
        g = g.reshape(-1, g.shape[-1])
        flat = ids.reshape(-1)
        if padding_idx is not None:
            g = g * (flat != padding_idx)[:, None].to(g.dtype)
        yield flat, g

    return pairs


def reduced(
    pairs: Callable[[Tensor], Pairs], x: Tensor, n: int | None
) -> Callable[[Tensor], Pairs]:
    """The setting "reduce": of an example's uses, the mean input and the sum of g."""

    def mean_pairs(g: Tensor) -> Pairs:
        if n is None or x.shape[0] != n or x.ndim < 3:
            yield from pairs(g)
            return
        for a, b in pairs(g):
            examples = n if len(a) % n == 0 else len(a)
            yield (
                a.view(examples, -1, a.shape[-1]).mean(1),
                b.view(examples, -1, b.shape[-1]).sum(1),
            )

    return mean_pairs


def convolution_pairs(
    x: Tensor, window: Window, groups: int, *, per_example: bool = False
) -> Callable[[Tensor], Pairs]:
    """Patches of x [N, in, ..] and g [N, out, ..], a row a position."""

    def pairs(g: Tensor) -> Pairs:
        for low, high in window.chunks(x):
            patches = window.patches(x[low:high], groups)  # [n, L, groups * in * K]
            y = g[low:high].flatten(2).mT  # [n, L, out]
            if per_example:
                yield patches.mean(1), y.sum(1)
            else:
                yield patches.flatten(0, 1), y.flatten(0, 1)

    return pairs


def transposed_convolution_pairs(
    x: Tensor, window: Window, groups: int
) -> Callable[[Tensor], Pairs]:
    """x [N, in, ..], a row a position, and the patches of g [N, out, ..] that it is written to."""

    def pairs(g: Tensor) -> Pairs:
        for low, high in window.chunks(g):
            places = x[low:high].flatten(2).mT  # [n, L, in]
            patches = window.patches(g[low:high], groups, count=x.shape[2:])
            yield places.flatten(0, 1), patches.flatten(0, 1)

    return pairs


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
