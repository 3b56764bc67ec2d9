"""Statistics of layers over examples, microbatches and ranks: one forward and half a backward pass each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hfdist.curvature.kronecker.calls import LayerSums, vector_blocks, vector_rows
from hfdist.curvature.kronecker.eigen import EigenBasis, Moments, Piece, moments
from hfdist.curvature.kronecker.factors import Factor, packed, unpacked
from hfdist.curvature.kronecker.keys import (
    BlockPlan,
    KroneckerKey,
    LayerBlock,
    Seen,
    VectorKey,
    plan_blocks,
)
from hfdist.curvature.kronecker.pace import cost_of
from hfdist.curvature.kronecker.passes import Pulled, WatchedPass
from hfdist.curvature.kronecker.watch import Shared
from hfdist.curvature.microbatch import Microbatch
from hfdist.curvature.objective import Problem


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How much is looked at."""

    share: float = 1.0
    """Of the gradient's examples."""
    samples: int = 1
    """Random vectors an example, of which each costs a backward pass."""
    shared: Shared = "expand"
    """See `LayerWatch`."""


@dataclass(kw_only=True)
class Statistics:
    """Curvature by blocks, in units of the objective's."""

    layers: dict[KroneckerKey, tuple[Factor, Factor]]
    """A, a mean over uses whose last row is the 1's, and G."""
    vectors: dict[VectorKey, Tensor]
    """See `vector_blocks`."""
    others: dict[int, Tensor]
    """Of a parameter of no known layer, the mean of the diagonal [1]."""
    moments: dict[LayerBlock, Moments] = field(default_factory=dict)
    """Of weights, where eigenvalues are corrected."""
    cost: float = 0.0
    """Counted work of taking them and inverting the factors, in gradients (see `pace`)."""

    def averaged(self, old: Statistics, mass: float) -> Statistics:
        """The mean of this and an older one that counts `mass` times; what only one of them has stays."""

        def mean(new: Tensor, before: Tensor) -> Tensor:
            # What no example went through this time says nothing.
            is_empty = (new.diagonal(dim1=-2, dim2=-1) if new.ndim > 1 else new).sum() == 0
            return torch.where(is_empty, before, (new + mass * before) / (1.0 + mass))

        def factors(key: KroneckerKey) -> tuple[Factor, Factor]:
            pairs = zip(self.layers[key], old.layers.get(key, self.layers[key]))
            A, G = (Factor(blocks=mean(a.blocks, b.blocks), n=a.n) for a, b in pairs)
            return A, G

        return Statistics(
            layers={key: factors(key) for key in self.layers},
            vectors={k: mean(t, old.vectors.get(k, t)) for k, t in self.vectors.items()},
            others={k: mean(t, old.others.get(k, t)) for k, t in self.others.items()},
            cost=self.cost,
        ).with_moments(self.moments, old, mass)

    def with_moments(
        self, new: Mapping[LayerBlock, Moments], old: Statistics | None = None, mass: float = 0.0
    ) -> Statistics:
        """These with second moments, averaged as above."""
        before = {} if old is None else old.moments
        found = {
            block: own.averaged(before[block], mass) if block in before else own
            for block, own in new.items()
        }
        return replace(self, moments=found)


def take_statistics(
    problem: Problem,
    sampling: Sampling,
    agreed: Seen | None = None,
    bases: Mapping[LayerBlock, EigenBasis] | None = None,
) -> tuple[BlockPlan, Statistics, Seen]:
    """Statistics of a step. Collective: one reduction; an exchange first, where a rank has seen what is not
    in `agreed`.

    Args:
        problem: The objective, after its gradient.
        sampling: How much is looked at.
        agreed: What any rank has seen in earlier steps, the same on all of them.
        bases: Of weights whose second moments are wanted.

    Returns:
        The blocks, their statistics, and what any rank has seen by now.

    Raises:
        DataError: The weights of the examples add up to nothing.
    """
    sums = _LocalSums(problem.params.zeros()[:0], bases or {})
    sums.add(problem, sampling)
    while True:
        if agreed is None:
            agreed = Seen()
            for seen in problem.comm.all_gather_object(sums.seen):
                agreed.update(seen)
        plan = plan_blocks(agreed, problem.params.tensors)
        is_new = not agreed.includes(sums.seen)
        found = _reduced(problem, plan, sums, sampling.samples, is_new, sampling.share < 1.0)
        if isinstance(found, Statistics):
            return plan, found, agreed
        if found == "nothing":
            return take_statistics(problem, replace(sampling, share=1.0), agreed, bases)
        agreed = None


def take_moments(
    problem: Problem, sampling: Sampling, bases: Mapping[LayerBlock, EigenBasis]
) -> dict[LayerBlock, Moments]:
    """Second moments alone, of the examples and random vectors that `take_statistics` sees. Collective: one
    reduction.

    Args:
        problem, sampling: As there.
        bases: Of weights.
    """
    sums = _LocalSums(problem.params.zeros()[:0], bases, with_factors=False)
    sums.add(problem, sampling)
    tensors = [sums.moments[block].view(-1) for block in bases]
    tensors.append(sums.like.new_full((1,), sums.weight))
    total = problem.comm.all_reduce(torch.cat(tensors))
    *tensors, end = total.split([t.numel() for t in tensors])
    weight = float(end)
    if weight == 0.0 and sampling.share < 1.0:
        return take_moments(problem, replace(sampling, share=1.0), bases)
    problem.count_statistics(weight)
    return sums.scaled_moments(tensors, problem.scale(weight) / sampling.samples)


def _reduced(
    problem: Problem,
    plan: BlockPlan,
    sums: _LocalSums,
    samples: int,
    is_new: bool,
    may_be_nothing: bool,
) -> Statistics | Literal["new", "nothing"]:
    """Sums over the ranks, normalised; "new" if any of them has seen something that is not in the plan, and
    "nothing" if the examples have no weight and that is no error."""
    like = sums.like
    layers = [sums.layers.get(key) or LayerSums.zeros(key, like) for key in plan.keys]
    vectors = [
        sums.vectors[key] if key in sums.vectors else vector_blocks(key, like)
        for key in plan.vectors
    ]
    others = [
        sums.others.get(k, like.new_zeros(samples, *problem.params.tensors[k].shape)).view(-1)
        for k in plan.others
    ]
    squares = [sums.moments[block].view(-1) for block in sums.bases]
    ends = torch.cat([like.new_full((1,), sums.weight), like.new_full((1,), float(is_new))])
    tensors = [t for layer in layers for t in layer.tensors] + vectors + others + squares + [ends]
    if problem.comm.world_size > 1:
        tensors = unpacked(problem.comm.all_reduce(packed(tensors)), tensors)
    # The host looks once.
    uses = tensors[2 : 3 * len(layers) : 3]
    weight, num_new, *numbers = torch.cat([tensors[-1], *uses]).tolist()
    if num_new > 0:
        return "new"
    if weight == 0.0 and may_be_nothing:
        return "nothing"
    problem.count_statistics(weight, (8 if sums.bases else 5) / 3)
    scale = problem.scale(weight) / samples
    rest = iter(tensors)
    cost = cost_of(
        plan.keys,
        layers,
        [number / samples for number in numbers],
        samples,
        weight / problem.gradient_weight,
    )
    result = Statistics(layers={}, vectors={}, others={}, cost=cost)
    for key, layer in zip(plan.keys, layers):
        A, G, number = next(rest), next(rest), next(rest)
        result.layers[key] = (
            Factor(blocks=A / number.clamp(min=1.0), n=layer.A.n),
            Factor(blocks=G * scale, n=layer.G.n),
        )
    for vector in plan.vectors:
        result.vectors[vector] = next(rest) * scale
    for k in plan.others:
        # Signs of different examples are independent: in the mean, the square of the sum is the sum of
        # the squares.
        result.others[k] = next(rest).square().mean().reshape(1) * (scale * samples)
    found = sums.scaled_moments([next(rest) for _ in squares], scale)
    return result.with_moments({b: found[b] for b in plan.layers if b in found})


@dataclass
class _LocalSums:
    """Sums over this rank's examples."""

    like: Tensor
    """Of the dtype and on the device of the sums."""
    bases: Mapping[LayerBlock, EigenBasis] = field(default_factory=dict)
    """Of second moments."""
    with_factors: bool = True
    """Whether anything else is added up."""
    seen: Seen = field(default_factory=Seen)
    layers: dict[KroneckerKey, LayerSums] = field(default_factory=dict)
    vectors: dict[VectorKey, Tensor] = field(default_factory=dict)
    others: dict[int, Tensor] = field(default_factory=dict)
    """J's of the parameters that no layer was seen of, [samples, *shape]."""
    moments: dict[LayerBlock, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def __post_init__(self) -> None:
        for block, basis in self.bases.items():
            key, n = block.keys[0], basis.scale.shape[1]
            self.moments[block] = self.like.new_zeros(key.groups, key.num_outputs, n)

    def add(self, problem: Problem, sampling: Sampling) -> None:
        """All microbatches."""
        for microbatch in problem.roles.gradient:
            part = microbatch if microbatch.part is None else microbatch.part(sampling.share)
            if part is None:
                continue
            try:
                self.add_microbatch(problem, part, sampling)
            except (RuntimeError, ValueError, IndexError):
                if part is microbatch or not microbatch.part_may_fail:
                    raise
                self.add_microbatch(problem, microbatch, sampling)

    def add_microbatch(self, problem: Problem, microbatch: Microbatch, sampling: Sampling) -> None:
        """A forward pass, and a backward pass a sample."""
        watched = WatchedPass(problem, microbatch, sampling.shared)
        self.weight += watched.weight
        for layer in watched.layers:
            self.seen.add(layer.key, layer.bias)
        self.seen.vectors.update(vector.key for vector in watched.vectors)
        for sample in range(sampling.samples):
            pulled = watched.pull(watched.draw(sample))
            with torch.no_grad():
                if self.with_factors:
                    self._add(pulled, sample, sampling.samples)
                if self.bases:
                    self._add_moments(pulled)

    def scaled_moments(self, sums: Sequence[Tensor], scale: float) -> dict[LayerBlock, Moments]:
        """Sums over all ranks, in the order of the bases, as means."""
        return {
            block: Moments(
                basis=basis, values=basis.levelled(total.view_as(self.moments[block]) * scale)
            )
            for (block, basis), total in zip(self.bases.items(), sums)
        }

    def _add_moments(self, pulled: Pulled) -> None:
        calls: dict[KroneckerKey, list[Iterable[Piece]]] = defaultdict(list)
        for layer, g in pulled.layers:
            calls[layer.key].append(layer.uses(g))
        for block, basis in self.bases.items():
            self.moments[block] += moments(block, basis, calls)

    def _add(self, pulled: Pulled, sample: int, samples: int) -> None:
        for layer, g in pulled.layers:
            if layer.key not in self.layers:
                self.layers[layer.key] = LayerSums.zeros(layer.key, self.like)
            for x, gx in layer.uses(g):
                self.layers[layer.key].add(layer.key, x, gx)
        for key, rows in vector_rows(pulled.vectors).items():
            if key not in self.vectors:
                self.vectors[key] = vector_blocks(key, self.like)
            rows.add_to(self.vectors[key], key)
        for k, v in pulled.others:
            if k not in self.others:
                self.others[k] = self.like.new_zeros(samples, *v.shape)
            self.others[k][sample] += v
