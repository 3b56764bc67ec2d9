"""A block-diagonal matrix of the layers' statistics, damped, and its inverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfdist.comm.balance import balanced
from hfdist.curvature.kronecker.eigen import EigenBasis, Moments
from hfdist.curvature.kronecker.factors import (
    Factor,
    inverses,
    multiply_left,
    multiply_right,
    packed,
    shifted,
    unpacked,
)
from hfdist.curvature.kronecker.keys import BlockPlan, LayerBlock
from hfdist.curvature.kronecker.statistics import Statistics
from hfdist.curvature.objective import Problem
from hfdist.curvature.params import ParameterVector
from hfdist.optim.objective import Operator

LEAST_DAMPING = 1e-4
"""What adds nothing else to a factor that is no metric's adds this, in units of its mean diagonal element."""


MOST_MOVED = 100.0
"""The most that C^-1 g may be of a block's parameters, by norm; sound blocks stay below some 25. A larger one
has no curvature on these examples (a recurrence whose state dies at once), and no loss says how far is too
far."""


MOST_RELATIVE = 3.0
"""The most that a metric adds to a factor, in units of its mean diagonal element."""


@dataclass
class Part(ABC):
    """A block, or its inverse."""

    matrices: list[Tensor]
    """Symmetric, [.., m, m]; the inverse block has their inverses."""

    @abstractmethod
    def apply(self, v: list[Tensor], out: list[Tensor]) -> None:
        """Write the product into this block's pieces of `out`.

        Args:
            v, out: Vectors in pieces shaped like the parameters.
        """

    @abstractmethod
    def pieces(self, v: Sequence[Tensor]) -> list[Tensor]:
        """What is this block's of a vector; views."""


@dataclass
class LayerPart(Part):
    """V [out, in] -> G V A of a weight, with the bias as V's last column; the matrices are G and A as damped,
    [groups, number, m, m]."""

    block: LayerBlock

    def apply(self, v: list[Tensor], out: list[Tensor]) -> None:
        key, bias = self.block.keys[0], self.block.bias
        V = self._of_groups(v)
        if bias is not None:
            b = v[bias.index].reshape(-1)[bias.start : bias.stop]
            V = torch.cat((V, b.view(key.groups, -1, 1)), 2)
        R = self._multiplied(V)
        if bias is not None:
            own = out[bias.index].view(-1)[bias.start : bias.stop]
            own.view(key.groups, -1).copy_(R[:, :, -1])
            R = R[:, :, :-1]
        self._of_groups(out).copy_(R)

    def pieces(self, v: Sequence[Tensor]) -> list[Tensor]:
        bias = self.block.bias
        own = [self._of_groups(v)]
        return own if bias is None else [*own, v[bias.index].reshape(-1)[bias.start : bias.stop]]

    def _multiplied(self, V: Tensor) -> Tensor:
        G, A = self.matrices
        return multiply_right(multiply_left(G, V), A)

    def _of_groups(self, pieces: Sequence[Tensor]) -> Tensor:
        """The weight's rows as [groups, out, in]; a view."""
        key = self.block.keys[0]
        W = pieces[key.rows.index][key.rows.start : key.rows.stop]
        W = W.view(key.groups, W.shape[0] // key.groups, -1)
        return W.mT if key.input_first else W


@dataclass
class EigenPart(LayerPart):
    """V [out, in] -> U_G (S * (U_G' V D U_A)) U_A' D: the matrices are S [groups, out, in, 1], as damped, and
    D [groups, in, 1], which are their own inverses' inverses, number by number."""

    basis: EigenBasis

    def _multiplied(self, V: Tensor) -> Tensor:
        S, D = (matrix[..., 0] for matrix in self.matrices)
        D = D[:, None, :]
        return self.basis.back(self.basis.into(V * D) * S) * D


@dataclass
class VectorPart(Part):
    """A full matrix [1, m, m] over the numbers of some parameters, or one for the k numbers of each channel
    [C, k, k]."""

    params: tuple[int, ...]

    def apply(self, v: list[Tensor], out: list[Tensor]) -> None:
        (M,) = self.matrices
        parts = [v[k].reshape(-1) for k in self.params]
        if M.shape[-1] == 1:
            results = [(M.view(-1) * part) for part in parts]
        elif len(M) == 1:
            results = list((M[0] @ torch.cat(parts)).split([len(part) for part in parts]))
        else:
            results = list((M @ torch.stack(parts, 1)[:, :, None])[:, :, 0].unbind(1))
        for k, result in zip(self.params, results):
            out[k].copy_(result.view(out[k].shape))

    def pieces(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [v[k] for k in self.params]


@dataclass(frozen=True)
class Inverse:
    """C^-1, of whole vectors [P], in its blocks; nothing writes to it, so that later steps may use it."""

    parts: Sequence[Part]
    limits: Tensor
    """What each block was enlarged by, at least 1, [parts] float64: see `limited`."""

    def operator(self, params: ParameterVector) -> Operator:
        """v -> C^-1 v; the next call overwrites the result."""
        out: Tensor | None = None

        def apply(v: Tensor) -> Tensor:
            nonlocal out
            if out is None:
                out = torch.empty_like(v)
            given, results = params.pieces(v), params.pieces(out)
            for part in self.parts:
                part.apply(given, results)
            return out

        return apply

    def limited(self, problem: Problem) -> Inverse:
        """With blocks enlarged where C^-1 g is more than MOST_MOVED times the parameters, which it is
        compared with since that needs no unit. Parameters that are all 0 say nothing. The host looks at none
        of it."""
        params = problem.params
        moved = params.pieces(self.operator(params)(problem.whole(problem.gradient)))
        factors = []
        for part in self.parts:
            size, step = (_norm(part.pieces(v)) for v in (params.tensors, moved))
            factor = torch.where(size > 0.0, step / (MOST_MOVED * size), 1.0).clamp(min=1.0)
            factors.append(torch.where(factor < torch.inf, factor, 1.0))  # and not NaN
        return self.divided(torch.stack(factors))

    def divided(self, limits: Tensor) -> Inverse:
        """Each block by a number, [parts]."""
        parts = [
            replace(
                part, matrices=[part.matrices[0] / limit.to(part.matrices[0]), *part.matrices[1:]]
            )
            for part, limit in zip(self.parts, limits)
        ]
        return Inverse(parts, self.limits * limits)


def inverted(
    problem: Problem,
    plan: BlockPlan,
    statistics: Statistics,
    damping: float | None,
    relative: float = 0.0,
    ratios: Tensor | None = None,
) -> Inverse:
    """The inverse of the damped matrix C. Collective: each rank inverts some of the blocks.

    Args:
        problem: Its parameters, L2 term and damping metric count.
        plan: The blocks.
        statistics: What they are made of.
        damping: lambda; None: C is a metric.
        relative: What a metric adds to each factor, and to each block without factors, in units of its mean
            diagonal element.
        ratios: What that is multiplied by [parameters]; None: by 1.
    """
    damped = _Damping(problem, damping, relative, ratios).parts(plan, statistics)
    inverses = _inverted(problem, [part.matrices for part in damped])
    parts = [replace(part, matrices=own) for part, own in zip(damped, inverses)]
    limits = torch.ones(len(parts), dtype=torch.float64, device=problem.params.device)
    return Inverse(parts, limits)


class _Damping:
    """How much is added to which factor, computed where the factors are: the host looks at none of it.

    Scalars are float64 tensors on the device, of shape [] or [groups].
    """

    def __init__(
        self, problem: Problem, damping: float | None, relative: float, ratios: Tensor | None
    ) -> None:
        self._params = problem.params
        shift = problem.regularisation.shift(damping or 0.0)
        self._shift = shift
        self._pieces = self._params.pieces(shift) if isinstance(shift, Tensor) else None
        self._is_metric = damping is None
        self._of_metric, self._ratios = relative, ratios
        self._typical = self._scalar(1.0)

    def _scalar(self, value: float) -> Tensor:
        """Filled in there: a copy from the host would wait."""
        return torch.full((), value, dtype=torch.float64, device=self._params.device)

    def parts(self, plan: BlockPlan, statistics: Statistics) -> list[Part]:
        """The blocks with damping."""
        factors = [factors_of(layer, statistics) for layer in plan.layers]
        vectors = [(key.params, statistics.vectors[key]) for key in plan.vectors]
        for index, keys in plan.biases.items():
            diagonal = sum(statistics.layers[key][1].diagonal().flatten() for key in keys)
            vectors.append(((index,), diagonal[:, None, None]))  # type: ignore[index]
        means = [(G.means() * A.means()).mean() for G, A in factors]
        means += [_diagonal(blocks).double().mean() for _, blocks in vectors]
        others = {k: mean.double().view(()) for k, mean in statistics.others.items()}
        # A block without curvature (nothing depends on it, or not in this sample) has the others' scale.
        self._typical = _mean_of_positive([*means, *others.values()], self._typical)
        parts: list[Part] = []
        for layer, (G, A) in zip(plan.layers, factors):
            moments = statistics.moments.get(layer)
            if moments is None:
                parts.append(LayerPart(self._layer(layer, G, A), layer))
            else:
                S = self._moments(layer, G, A, moments)
                scale = moments.basis.scale[..., None]
                parts.append(EigenPart([S[..., None], scale], layer, moments.basis))
        for params, blocks in vectors:
            parts.append(VectorPart([self._vector(params, blocks)], params))
        for k in plan.others:
            mean = self._or_typical(others[k] + self._shift_of([k]))
            blocks = statistics.others[k].view(1, 1, 1)
            parts.append(VectorPart([mean.to(blocks).expand_as(blocks)], (k,)))
        return parts

    def _layer(self, layer: LayerBlock, G: Factor, A: Factor) -> list[Tensor]:
        """Factored Tikhonov damping (Martens & Grosse 2015, section 6.3): the shift s of the block adds
        sqrt(s) / pi to G and pi sqrt(s) to A, with pi^2 the ratio of A's mean to G's."""
        index = layer.keys[0].rows.index
        shift = self._shift_of([index])
        relative = self._relative(shift, index)
        g, a = G.means(), A.means()  # [groups]
        pi = torch.where((g > 0) & (a > 0), (a / g).sqrt(), 1.0)
        root = shift.sqrt()
        add_g, add_a = pi.reciprocal() * root, root * pi
        is_empty = ((g * a == 0) & (shift == 0.0))[:, None]
        add_G = (add_g + relative * g)[:, None].expand(-1, G.n)
        add_A = (add_a + relative * a)[:, None].expand(-1, A.n)
        if layer.bias is not None:
            # The 1 beside the inputs has units of its own: rescaled inputs must not change its share.
            inputs = A.diagonal().double()
            of_inputs = (add_a + relative * inputs[:, :-1].mean(1))[:, None].expand(-1, A.n - 1)
            of_one = (add_a + relative * inputs[:, -1])[:, None]
            add_A = torch.where(relative > 0.0, torch.cat((of_inputs, of_one), 1), add_A)
        typical = self._typical.sqrt()
        return [
            shifted(factor, torch.where(is_empty, typical, add))
            for factor, add in ((G, add_G), (A, add_A))
        ]

    def _moments(self, layer: LayerBlock, G: Factor, A: Factor, moments: Moments) -> Tensor:
        """S, damped [groups, out, in]: the shift exactly and, in units of S's mean, what factored damping
        adds to a product of the factors' values."""
        basis, S = moments.basis, moments.values
        index = layer.keys[0].rows.index
        shift = self._shift_of([index])
        relative = self._relative(shift, index).to(S)
        g, a = (_in_units_of_mean(values) for values in basis.values(G, A))
        mean = S.mean((1, 2), keepdim=True)  # [groups, 1, 1]
        damped = S + relative * mean * (g[:, :, None] + a[:, None, :] + relative)
        damped = damped + shift.to(S) * basis.of_identity()[:, None, :]
        is_empty = (mean == 0) & (shift == 0.0)
        return torch.where(is_empty, self._typical.to(S), damped)

    def _vector(self, params: tuple[int, ...], blocks: Tensor) -> Tensor:
        shift = self._shift_of(params)
        mean = _diagonal(blocks).double().mean()
        shift = self._or_typical(shift + self._relative(shift, params[0]) * mean)
        found = blocks.clone()
        _diagonal(found).add_(shift.to(found))
        return found

    def _or_typical(self, value: Tensor) -> Tensor:
        """The value; where it is 0, the typical scale."""
        return torch.where(value == 0.0, self._typical, value)

    def _relative(self, shift: Tensor, index: int) -> Tensor:
        """What is added relative to a block's own scale, where so much is added otherwise; `index` is that of
        its first parameter."""
        if self._is_metric:
            relative = self._scalar(self._of_metric)
            if self._ratios is not None:
                relative = (relative * self._ratios[index]).clamp(max=MOST_RELATIVE)
            return relative
        return (shift == 0.0) * self._scalar(LEAST_DAMPING)

    def _shift_of(self, params: Sequence[int]) -> Tensor:
        """Mean of L2 and damping over some parameters."""
        if self._pieces is None:
            assert not isinstance(self._shift, Tensor)
            return self._scalar(self._shift)
        return torch.cat([self._pieces[k].reshape(-1) for k in params]).double().mean()


def _mean_of_positive(scalars: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    """Mean of those above 0; of none of them `otherwise`."""
    if not scalars:
        return otherwise
    values = torch.stack([s.double() for s in scalars])
    is_positive = values > 0.0  # (a mean that is not a number is none of them)
    number = is_positive.sum()
    total = torch.where(is_positive, values, 0.0).sum()
    return torch.where(number > 0, total / number.clamp(min=1), otherwise)


def _norm(pieces: Sequence[Tensor]) -> Tensor:
    return torch.stack([piece.detach().double().square().sum() for piece in pieces]).sum().sqrt()


def _in_units_of_mean(values: Tensor) -> Tensor:
    """[groups, n]; of zeros zeros."""
    mean = values.mean(1, keepdim=True)
    return values / torch.where(mean > 0, mean, 1.0)


def _diagonal(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1)


def factors_of(layer: LayerBlock, statistics: Statistics) -> tuple[Factor, Factor]:
    """G and A of a weight, as its first key counts outputs and inputs.

    Of a weight that is used both ways round the block is the sum of Kronecker products; the product here has
    the sum's partial traces.
    """
    found = []
    for key in layer.keys:
        A, G = statistics.layers[key]
        if layer.bias is None and not key.is_one_hot:
            A = A.without_last()
        found.append((G, A) if key.input_first == layer.keys[0].input_first else (A, G))
    if len(found) == 1:
        return found[0]
    traces = [(G.means() * G.n, A.means() * A.n) for G, A in found]  # each [groups]
    total = sum(g * a for g, a in traces)
    G, A = found[0][0].times(traces[0][1]), found[0][1].times(traces[0][0])
    for (G2, A2), (g, a) in zip(found[1:], traces[1:]):
        G, A = G.plus(G2.times(a)), A.plus(A2.times(g))
    safe = torch.where(total > 0, total, 1.0)  # type: ignore[arg-type]
    return G, A.times(1.0 / safe)


def _inverted(problem: Problem, parts: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Inverses of all matrices, each computed by one rank."""
    comm = problem.comm
    flat = [matrix for matrices in parts for matrix in matrices]
    large = [k for k, matrix in enumerate(flat) if matrix.shape[-1] > 1]
    found = {k: flat[k].reciprocal() for k in range(len(flat)) if flat[k].shape[-1] == 1}
    costs = [float(flat[k].numel() * flat[k].shape[-1]) for k in large]
    mine = {large[i] for i in balanced(costs, comm.world_size)[comm.rank]}
    inverted = dict(zip(sorted(mine), inverses([flat[k] for k in sorted(mine)])))
    own = [inverted[k] if k in mine else torch.zeros_like(flat[k]) for k in large]
    if comm.world_size > 1 and own:
        own = unpacked(comm.all_reduce(packed(own)), own)
    found.update(zip(large, own))
    rest = iter(range(len(flat)))
    return [[found[next(rest)] for _ in matrices] for matrices in parts]
