"""Eigenvalue-corrected Kronecker blocks, George et al. 2018 (EKFAC).

In the eigenvectors of a layer's factors G and A, K-FAC takes the block for diagonal, with products of the
factors' eigenvalues there. The block's own diagonal in that basis is the second moment of each example's
derivatives, E[(U_G' dW U_A)^2] element by element: of all diagonals the nearest one (their section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hfdist.comm.balance import balanced
from hfdist.comm.communicator import Communicator
from hfdist.curvature.kronecker.factors import Factor, multiply_left, multiply_right
from hfdist.curvature.kronecker.keys import KroneckerKey, LayerBlock
from hfdist.curvature.kronecker.squares import CHUNK, Pieces, sum_of_squares

Piece = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class EigenBasis:
    """Of derivatives V [groups, out, in] of a weight, with the bias as last column: V -> U_G' V D^-1 U_A."""

    G: Tensor
    """U_G, eigenvectors in columns, [groups, number, m, m] (see `Factor`); ones for a diagonal factor."""
    A: Tensor
    """U_A, of D^-1 A D^-1."""
    scale: Tensor
    """D [groups, in]: other units of the inputs must not turn them against the 1 beside them."""
    flat_G: Tensor
    """1 where the factor has nothing, and rounding alone chose the vectors, [groups, out]; else 0."""
    flat_A: Tensor
    """[groups, in]."""

    def into(self, V: Tensor) -> Tensor:
        """U_G' V U_A."""
        return multiply_right(multiply_left(self.G.mT, V), self.A)

    def back(self, R: Tensor) -> Tensor:
        """U_G R U_A'."""
        return multiply_right(multiply_left(self.G, R), self.A.mT)

    def levelled(self, moments: Tensor) -> Tensor:
        """Moments [groups, out, in], with means over the flat directions of each side in place of theirs:
        what each of them has depends on how these vectors were chosen, the mean does not."""
        return _levelled(_levelled(moments.mT, self.flat_G).mT, self.flat_A)

    def values(self, G: Factor, A: Factor) -> tuple[Tensor, Tensor]:
        """Diagonals of the factors in the basis, U_G' G U_G [groups, out] and U_A' D^-1 A D^-1 U_A
        [groups, in]; levelled."""
        found = []
        sides = (self.G, G.blocks, self.flat_G), (self.A, _scaled(A, self.scale), self.flat_A)
        for U, blocks, flat in sides:
            diagonal = ((blocks @ U) * U).sum(2).flatten(1)[:, : flat.shape[1]]
            found.append(_levelled(diagonal[:, None].clamp(min=0.0), flat)[:, 0])
        return found[0], found[1]

    def of_identity(self) -> Tensor:
        """Diagonal of the identity of the weight's own coordinates, U_A' D^-2 U_A [groups, in]; levelled."""
        groups, number, size, _ = self.A.shape
        n = self.scale.shape[1]
        d = F.pad(self.scale, (0, number * size - n), value=1.0).view(groups, number, size, 1)
        diagonal = (self.A / d).square().sum(2).flatten(1)[:, :n]
        return _levelled(diagonal[:, None], self.flat_A)[:, 0]


def _levelled(values: Tensor, flat: Tensor) -> Tensor:
    """Along the last axis of values [groups, k, n], the mean of those that are flat [groups, n] in place of
    each."""
    flat = flat[:, None, :]
    number = flat.sum(2, keepdim=True).clamp(min=1.0)
    mean = (values * flat).sum(2, keepdim=True) / number
    return values * (1.0 - flat) + mean * flat


@dataclass(frozen=True, kw_only=True)
class Moments:
    """A block's diagonal in a basis."""

    basis: EigenBasis
    values: Tensor
    """[groups, out, in], in units of the curvature."""

    def averaged(self, old: Moments, mass: float) -> Moments:
        """The mean of this and an older one that counts `mass` times, of which the diagonal in this basis is
        taken."""
        before = old.values
        if old.basis is not self.basis:
            before = _turned(old, self.basis)
        is_empty = self.values.sum() == 0  # what no example went through says nothing
        mean = torch.where(is_empty, before, (self.values + mass * before) / (1.0 + mass))
        # As a checkpoint gives it back: sums over another layout round otherwise.
        return Moments(basis=self.basis, values=mean.contiguous())


def _turned(old: Moments, basis: EigenBasis) -> Tensor:
    """diag(T diag(old) T') [groups, out, in], T from the old basis to this one: T's squares times the old."""
    left = (old.basis.G.mT @ basis.G).square()
    groups, number, size, _ = basis.A.shape
    ratio = F.pad(old.basis.scale / basis.scale, (0, number * size - basis.scale.shape[1]))
    right = (old.basis.A.mT @ (ratio.view(groups, number, size, 1) * basis.A)).square()
    return multiply_right(multiply_left(left.mT, old.values), right)


# -- bases -------------------------------------------------------------------------------------------


def eigenbases(
    comm: Communicator, factors: Mapping[LayerBlock, tuple[Factor, Factor]], is_metric: bool
) -> dict[LayerBlock, EigenBasis]:
    """The bases of factors (G, A). Collective: each rank decomposes some of them, in float64.

    Args:
        comm: The ranks.
        factors: By block.
        is_metric: Inputs are counted in units of their root mean square (D); otherwise D = I, so that damping
            is a diagonal in the basis, too.
    """
    scales = [_scale(block, A, is_metric) for block, (_, A) in factors.items()]
    matrices, sizes = [], []
    for (G, A), scale in zip(factors.values(), scales):
        matrices += [G.blocks, _scaled(A, scale)]
        sizes += [G.n, A.n]
    found = [torch.ones_like(matrix) for matrix in matrices]
    flat = [torch.zeros_like(matrix[..., 0]) for matrix in matrices]
    large = [k for k, matrix in enumerate(matrices) if matrix.shape[-1] > 1]
    costs = [float(matrices[k].numel() * matrices[k].shape[-1]) for k in large]
    mine = {large[i] for i in balanced(costs, comm.world_size)[comm.rank]}
    for k in large:
        if k in mine:
            found[k], flat[k] = eigenvectors(matrices[k], sizes[k])
        else:
            found[k] = torch.zeros_like(found[k])
    if comm.world_size > 1 and large:
        own = [t for k in large for t in (found[k], flat[k])]
        total = comm.all_reduce(torch.cat([t.reshape(-1) for t in own]))
        shared = [part.view(t.shape) for part, t in zip(total.split([t.numel() for t in own]), own)]
        for k, vectors, is_flat in zip(large, shared[::2], shared[1::2]):
            found[k], flat[k] = vectors, is_flat
    bases = {}
    for i, (block, (G, A)) in enumerate(factors.items()):
        flats = [
            f.flatten(1)[:, :n] for f, n in zip(flat[2 * i : 2 * i + 2], (G.n, A.n), strict=True)
        ]
        bases[block] = EigenBasis(
            G=found[2 * i], A=found[2 * i + 1], scale=scales[i], flat_G=flats[0], flat_A=flats[1]
        )
    return bases


def eigenvectors(blocks: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of a positive semidefinite factor, in columns by rising eigenvalue, and which of these are flat (see
    `EigenBasis`); computed in float64. Where there are none (a matrix that is not finite) the identity:
    moments are exact in any basis.

    Args:
        blocks: [groups, number, m, m].
        n: Rows of the factor (see `Factor`).

    Returns:
        [groups, number, m, m] and [groups, number, m].
    """
    m, dtype = blocks.shape[-1], blocks.dtype
    try:
        values, vectors = torch.linalg.eigh(_isolated(blocks.double(), n))
    except torch.linalg.LinAlgError:
        identity = torch.eye(m, dtype=dtype, device=blocks.device)
        return identity.expand_as(blocks).clone(), torch.zeros_like(blocks[..., 0])
    largest = blocks.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    flat = values <= 10.0 * m**0.5 * torch.finfo(dtype).eps * largest
    # As a checkpoint gives them back: products of another layout round otherwise.
    return vectors.to(dtype).contiguous(), flat.to(dtype)


def _scale(block: LayerBlock, A: Factor, is_metric: bool) -> Tensor:
    """D: the root mean square of the inputs, and of the 1 beside them."""
    squares = A.diagonal()  # [groups, in]
    if not is_metric:
        return torch.ones_like(squares)
    inputs = squares.shape[1] - (block.bias is not None)
    parts = squares[:, :inputs], squares[:, inputs:]
    means = [part.mean(1, keepdim=True).expand_as(part) for part in parts if part.shape[1]]
    size = torch.cat(means, 1).sqrt()
    return torch.where(size > 0.0, size, 1.0)


def _scaled(A: Factor, scale: Tensor) -> Tensor:
    """Blocks of D^-1 A D^-1."""
    groups, number, size, _ = A.blocks.shape
    d = F.pad(scale, (0, number * size - A.n), value=1.0).view(groups, number, size)
    return A.blocks / (d[..., :, None] * d[..., None, :])


def _isolated(blocks: Tensor, n: int) -> Tensor:
    """Blocks with so large a diagonal beyond n that eigenvectors there are the last, and apart."""
    _, number, size, _ = blocks.shape
    if number * size == n:
        return blocks
    beyond = torch.arange(number * size, device=blocks.device).view(number, size) >= n
    trace = blocks.diagonal(dim1=2, dim2=3).sum(-1, keepdim=True)
    return blocks + torch.diag_embed(beyond * (torch.finfo(trace.dtype).tiny + 2.0 * trace))


# -- moments -----------------------------------------------------------------------------------------


def moments(
    block: LayerBlock,
    basis: EigenBasis,
    calls: Mapping[KroneckerKey, Sequence[Iterable[Piece]]],
) -> Tensor:
    """Sum over a microbatch's examples of their squared derivatives in the basis, [groups, out, in]. An
    example's derivatives are added up over the uses of a weight before they are squared, but not over a use
    as a table and one as a matrix; of a table alone each use counts as an example.

    Args:
        block: The weight's.
        basis: Of it.
        calls: Inputs and g of a layer's calls, by key.
    """
    first = block.keys[0]
    total = basis.scale.new_zeros(first.groups, first.num_outputs, basis.scale.shape[1])
    for key in block.keys:
        is_turned = key.input_first != first.input_first
        for pieces in _together(calls.get(key, ())):
            found = _of_pieces(block, key, basis, pieces, is_turned)
            total += found.mT if is_turned else found
    return total


def _together(calls: Sequence[Iterable[Piece]]) -> Iterator[Sequence[Pieces]]:
    """Pieces of one call are of different examples, and looked at one by one; those of several calls are of
    the same."""
    if len(calls) == 1:
        yield from ([[piece]] for piece in calls[0])
    elif calls:
        yield [list(pieces) for pieces in calls]


def _of_pieces(
    block: LayerBlock,
    key: KroneckerKey,
    basis: EigenBasis,
    calls: Sequence[Pieces],
    is_turned: bool,
) -> Tensor:
    """[groups, out, in] as the key counts them."""

    def left(x: Tensor) -> Tensor:
        return _rotated(x.to(basis.G), key.groups, basis.G)

    def right(x: Tensor) -> Tensor:
        x = x.to(basis.A).reshape(*x.shape[:2], key.groups, -1)
        if block.bias is not None:
            x = F.pad(x, (0, 1), value=1.0)
        return _rotated((x / basis.scale).flatten(2), key.groups, basis.A)

    of_inputs, of_outputs = (left, right) if is_turned else (right, left)
    U = basis.G if is_turned else basis.A
    if not key.is_one_hot:
        joined = key if block.bias is None else replace(key, num_inputs=key.num_inputs + 1)
        rotated = [[(of_inputs(a), of_outputs(g)) for a, g in pieces] for pieces in calls]
        return sum_of_squares(joined, rotated)
    if U.shape[-1] == 1:
        found = sum_of_squares(key, [[(a, of_outputs(g)) for a, g in pieces] for pieces in calls])
        return found if is_turned else found / basis.scale.square()[:, None]
    dense = replace(key, is_one_hot=False)
    total = basis.scale.new_zeros(1, key.num_outputs, key.num_inputs)
    for ids, g in (piece for pieces in calls for piece in pieces):
        step = max(1, CHUNK // max(1, ids[:1].numel() * key.num_inputs))
        for low in range(0, len(ids), step):
            rows = F.one_hot(ids[low : low + step], key.num_inputs)
            piece = of_inputs(rows.to(g)), of_outputs(g[low : low + step])
            total += sum_of_squares(dense, [[piece]])
    return total


def _rotated(x: Tensor, groups: int, U: Tensor) -> Tensor:
    """x [n, T, groups * m] times U, group by group."""
    n, uses = x.shape[:2]
    V = x.reshape(n * uses, groups, -1).transpose(0, 1)  # [groups, R, m]
    return multiply_right(V, U).transpose(0, 1).reshape(n, uses, -1)
