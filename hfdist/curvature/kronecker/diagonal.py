"""Diagonal of the generalized Gauss-Newton matrix from the layers' uses.

diag(J'H_L J) is the mean of (J's)^2 over random s with E[ss'] = H_L, example by example (Chapelle & Erhan
2011); exactly, it is the sum over the columns of S, SS' = H_L (Dangel, Kunstner & Hennig 2020: DiagGGNMC and
DiagGGNExact), here for any layer. An example's derivatives are added up over the uses of a weight before
they are squared, but not over different operations that share a parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from hfdist.curvature.kronecker.calls import summed, vector_rows
from hfdist.curvature.kronecker.keys import KroneckerKey
from hfdist.curvature.kronecker.passes import Pulled, WatchedPass
from hfdist.curvature.kronecker.squares import Pieces, sum_of_squares
from hfdist.curvature.loss_root import Column
from hfdist.curvature.objective import Problem


def ggn_diagonal(problem: Problem, share: float, samples: int | None) -> Tensor:
    """diag(G) [P], of the global mean. Collective: one reduction.

    Args:
        problem: The objective, after its gradient.
        share: Of the gradient's examples.
        samples: Random vectors an example; None: all columns, exactly.

    Parameters of no known layer have the mean over the tensor, of one sample.

    Raises:
        DataError: The weights of the examples add up to nothing.
    """
    params = problem.params
    squares, sums = params.zeros(), params.zeros()
    number, weight = 0, 0.0
    for microbatch in problem.roles.gradient:
        part = microbatch if microbatch.part is None else microbatch.part(share)
        if part is None:
            continue
        watched = WatchedPass(problem, part)
        weight += watched.weight
        for number, pulled in enumerate(_pulled(watched, samples), start=1):
            with torch.no_grad():
                own = params.zeros()
                _add_squares(pulled, params.pieces(own))
                squares.add_(own, alpha=1.0 if samples is None else 1.0 / samples)
                if number == 1 or samples is None:
                    for k, v in pulled.others:
                        params.pieces(sums)[k].add_(v)
    ends = squares.new_full((1,), weight)  # filled in there: a copy from the host would wait
    total = problem.comm.all_reduce(torch.cat((squares, sums, ends)))
    squares, sums, ends = total.split([params.numel, params.numel, 1])
    if float(ends) == 0.0 and share < 1.0:  # none of few examples was chosen
        return ggn_diagonal(problem, 1.0, samples)
    problem.count_statistics(float(ends), (1 + 2 * max(1, number)) / 3)
    for piece, unseen in zip(params.pieces(squares), params.pieces(sums)):
        piece.add_(unseen.square().mean())
    return squares.mul_(problem.scale(float(ends)))


def _pulled(watched: WatchedPass, samples: int | None) -> Iterator[Pulled]:
    """Backward passes of random vectors, or of every column."""
    if samples is not None:
        yield from (watched.pull(watched.draw(sample)) for sample in range(samples))
        return
    number, count = 0, 1
    while number < count:
        column = Column(watched.num_examples, number)
        yield watched.pull(column)
        number, count = number + 1, column.count


def _add_squares(pulled: Pulled, out: list[Tensor]) -> None:
    """Add an example's squared derivatives, summed over the examples."""
    calls: dict[KroneckerKey, list[Pieces]] = defaultdict(list)
    biases: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for layer, g in pulled.layers:
        pieces = list(layer.uses(g))
        calls[layer.key].append(pieces)
        if layer.bias is not None:
            total = torch.cat([gx.sum(1) for _, gx in pieces])  # [n, out]
            biases[layer.bias.index].append((layer.bias.start, total))
    for key, of_key in calls.items():
        rows = out[key.rows.index][key.rows.start : key.rows.stop]
        found = sum_of_squares(key, of_key)  # [groups, out, in]
        rows.add_((found.mT if key.input_first else found).reshape(rows.shape))
    for index, parts in biases.items():
        for start in {start for start, _ in parts}:
            for (total,) in summed([[t] for other, t in parts if other == start]):
                out[index].view(-1)[start : start + total.shape[1]].add_(total.square().sum(0))
    for vector, rows_of in vector_rows(pulled.vectors).items():
        if vector.is_diagonal:
            for (squared,) in rows_of.calls:
                out[vector.params[0]].add_(squared.view(out[vector.params[0]].shape))
            continue
        for of_params in summed(rows_of.calls):
            for index, each in zip(vector.params, of_params):
                out[index].view(-1).add_(each.square().sum(0))
