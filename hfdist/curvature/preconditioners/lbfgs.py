"""L-BFGS from the last solve's own products, Morales & Nocedal 2000 and Sainath et al. 2013."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.context import Builder, Context
from hfdist.optim.objective import Operator


class CompactInverse:
    """The inverse BFGS matrix of pairs s, y = Bs in compact form: Byrd, Nocedal & Schnabel 1994, theorem 2.2.

        gamma I + [S, gamma Y] [[R^-T (D + gamma Y'Y) R^-1, -R^-T], [-R^-1, 0]] [S, gamma Y]'

    with S'Y = R + (its strictly lower part), D the diagonal, gamma = s'y / y'y of the last pair: one
    reduction of scalars a product.

    Args:
        S, Y: This rank's parts [m, n]; s'y > 0 for every pair.
        problem: Adds up dot products of parts.
    """

    def __init__(self, S: Tensor, Y: Tensor, problem: Problem) -> None:
        m = len(S)
        grams = problem.total(torch.cat((S.double(), Y.double())) @ Y.double().T)  # [2 m, m]
        SY, YY = grams[:m], grams[m:]
        self._gamma = float(SY[-1, -1] / YY[-1, -1])
        R = torch.linalg.inv(SY.triu())
        D = SY.diagonal().diag()
        zero = torch.zeros_like(R)
        corner = R.T @ (D + self._gamma * YY) @ R
        self._middle = torch.cat((torch.cat((corner, -R.T), 1), torch.cat((-R, zero), 1)))
        self._rows = torch.cat((S, self._gamma * Y))  # [2 m, n]
        self._problem = problem

    def __call__(self, v: Tensor) -> Tensor:
        inside = self._problem.total((self._rows @ v).double())
        return self._gamma * v + self._rows.T @ (self._middle @ inside).to(v.dtype)


def lbfgs(context: Context) -> Builder:
    """From `lbfgs_pairs` products of the last step's solve; nothing in the first step."""
    most, pairs = context.options.lbfgs_pairs, context.memory.pairs
    taken: list[Sequence[tuple[Tensor, Tensor]]] = []  # once a step, whatever its dampings

    def build(problem: Problem, damping: float | None) -> Operator | None:
        if not taken:
            taken.append(pairs.begin(problem.part_of))
            problem.on_product = lambda v, Bv: pairs.add(v, Bv, most)
        found = [(s, y) for s, y in taken[0] if len(s) == problem.part_numel]
        if not found:
            return None
        S, Y = (torch.stack(vectors) for vectors in zip(*found))  # [m, n]
        Y = Y + problem.shift_part(damping or 0.0) * S
        curvatures, sizes = problem.total(
            torch.stack(((S * Y).double().sum(1), (Y * Y).double().sum(1)))
        )
        good = (curvatures > 0.0) & sizes.isfinite()
        if not bool(good.any()):
            return None
        return CompactInverse(S[good], Y[good], problem)

    return build
