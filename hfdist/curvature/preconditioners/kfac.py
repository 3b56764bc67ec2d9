"""Kronecker-factored approximation of the generalized Gauss-Newton matrix, Martens & Grosse 2015.

Of a layer y = Wx + b the block of (W, b) is A x G: A the mean over the examples of xx', with a 1 appended
to x for the bias, and G the sum of gg', g = (dz/dy)'s with random s whose mean outer product is the loss's
Hessian in the outputs z (`loss_root`), so that the block is in units of the curvature. Of a layer that is
used several times an example (over a sequence), all uses count as examples: the setting "expand" of
Eschenhagen et al. 2023. Every other parameter tensor has a multiple of the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.curvature.preconditioners.kronecker import RELATIVE_FLOOR, KroneckerBlock
from hfdist.curvature.preconditioners.layer_statistics import layer_statistics
from hfdist.optim.objective import Operator


def kfac(context: Context) -> Builder:
    """Blocks of layers; multiples of the identity elsewhere."""
    built: list[Blocks] = []  # of this step: they do not depend on the damping

    def build(problem: Problem, damping: float | None) -> Operator:
        if not built:
            built.append(Blocks(problem, context.options.kfac_examples))
        return built[0].inverse(problem, damping)

    return build


class Blocks:
    """The blocks of one step. Collective.

    Args:
        problem: The objective, after its gradient.
        share: Of the examples of the gradient, for the statistics.
    """

    def __init__(self, problem: Problem, share: float) -> None:
        statistics = layer_statistics(problem, share)
        self._blocks = {layer: KroneckerBlock(A, G) for layer, (A, G) in statistics.layers.items()}
        self._others = {k: float(d.double().mean()) for k, d in statistics.diagonals.items()}

    def inverse(self, problem: Problem, damping: float | None) -> Operator:
        """Product with the inverse at a damping, or with that of the metric (None)."""
        params = problem.params
        shift = problem.regularisation.shift(damping or 0.0)
        means = [block.mean for block in self._blocks.values()] + list(self._others.values())
        typical = sum(means) / len(means)

        def shift_of(k: int, mean: float) -> float:
            start, stop = params.spans[k]
            own = float(shift[start:stop].mean()) if isinstance(shift, Tensor) else shift
            # A parameter that nothing depends on has the others' scale.
            floor = RELATIVE_FLOOR * (mean or typical) if damping is None else 0.0
            return own + floor if own + floor + mean > 0.0 else 1.0

        inverses = [
            (layer, block.inverse(shift_of(layer.weight, block.mean)))
            for layer, block in self._blocks.items()
        ]
        factors = [(k, 1.0 / (mean + shift_of(k, mean))) for k, mean in self._others.items()]

        def M(v: Tensor) -> Tensor:
            out = torch.empty_like(v)
            given, results = params.pieces(v), params.pieces(out)
            for layer, inverse in inverses:
                W, R = given[layer.weight], results[layer.weight]
                if layer.bias is None:
                    R.copy_(inverse(W))
                else:
                    joint = inverse(torch.cat((W, given[layer.bias][:, None]), 1))
                    R.copy_(joint[:, :-1])
                    results[layer.bias].copy_(joint[:, -1])
            for k, factor in factors:
                torch.mul(given[k], factor, out=results[k])
            return out

        return problem.of_whole(M)
