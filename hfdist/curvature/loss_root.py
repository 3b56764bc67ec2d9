"""Random vectors s in the space of the outputs whose mean outer product is the loss's Hessian.

With E[ss'] = H_L, the rows g = J's have E[gg'] = J'H_L J, the generalized Gauss-Newton matrix: what K-FAC
(Martens & Grosse 2015) gets from targets drawn from the model's own distribution, without a distribution
and with less variance. s = S u, SS' = H_L, u of random signs (Botev, Ritter & Barber 2017 take all columns of
S instead). Linear in the loss's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hfdist.curvature.example_signs import example_seeds, of_examples, signs_like
from hfdist.curvature.loss_hessian import ByDoubleBackward, derivatives_in
from hfdist.curvature.microbatch import Evaluation
from hfdist.curvature.outputs import Edge, edge, is_reached
from hfdist.curvature.reverse import grad

NUM_PROBES = 4


Draw = Callable[[Tensor], Tensor]
"""x -> u of its shape; called for one tensor after another."""


class Random:
    """u for one tensor after another: signs that belong to examples.

    Args:
        seeds: One an example, int64 [n]; None: one a row, from `seed`.
        seed: Of the microbatch.
        sample: Number of the sample.
    """

    def __init__(self, seeds: Tensor | None, seed: int, sample: int = 0) -> None:
        self._seeds, self._seed, self._salt = seeds, seed, (sample + 1) << 16

    def __call__(self, x: Tensor) -> Tensor:
        seeds = self._seeds
        if seeds is None:
            n = x.shape[0] if x.ndim else 1
            seeds = example_seeds(self._seed, torch.arange(n, device=x.device))
        self._salt += 1
        return signs_like(x, seeds, self._salt)


class Column:
    """u of each example is one and the same unit vector: over all of them the columns of S, one by one.

    Args:
        num_examples: n; None: the first axis.
        number: Of the column, counted over the tensors.
    """

    def __init__(self, num_examples: int | None, number: int) -> None:
        self._n, self._number = num_examples, number
        self.count = 0
        """Columns that the tensors so far have."""

    def __call__(self, x: Tensor) -> Tensor:
        n = self._n if self._n is not None else x.shape[0] if x.ndim else 1
        return of_examples(x, n, self._unit)

    def _unit(self, x: Tensor, n: int) -> Tensor:
        u = torch.zeros_like(x, memory_format=torch.contiguous_format)
        size = x.numel() // max(1, n)
        place = self._number - self.count
        self.count += size
        if 0 <= place < size:
            u.view(n, size)[:, place] = 1.0
        return u


def loss_root(e: Evaluation, draw: Draw, probe: Draw) -> list[tuple[Edge, Tensor]]:
    """Tensors of an evaluation's graph and the parts of s in them.

    Args:
        e: A forward pass.
        draw: u.
        probe: Random signs for the estimate.

    Known losses (cross entropy, with logits, squared error) have S in closed form. For others H_L is taken
    for its diagonal, by Hutchinson's estimate d = |mean of u * H_L u|: exact where the loss adds up
    functions of single numbers.
    """
    closed = e.closed_form()
    if closed is not None:
        found = zip(e.outputs, closed.root(draw))
        return [(edge(z), s) for z, s in found if s is not None]
    if not e.is_split:
        known = _of_calls(e, draw)
        if known is not None:
            return known
    return _by_probes(e, draw, probe)


def _of_calls(e: Evaluation, draw: Draw) -> list[tuple[Edge, Tensor]] | None:
    """S u in the arguments of known losses, whatever computed these; None if the loss is another one."""
    calls = [call for call in e.loss_calls if call.is_loss]
    results = [call.result for call in calls]
    if not calls or not all(call.is_current() for call in calls):
        return None
    if is_reached(e.loss_sum, e.outputs, without=results):
        return None
    factors = derivatives_in(e.loss_sum, results)
    pairs = []
    for call, factor in zip(calls, factors):
        if factor is None:
            continue
        if factor.requires_grad:
            return None
        with torch.no_grad():
            pairs.append((call.argument, call.root(factor.detach())(draw(call.input.detach()))))
    return pairs


def _by_probes(e: Evaluation, draw: Draw, probe: Draw) -> list[tuple[Edge, Tensor]]:
    if not e.loss_inputs:
        return []
    gradient = grad(
        e.loss_sum, e.loss_inputs, create_graph=True, retain_graph=True, allow_unused=True
    )
    H = ByDoubleBackward(e.loss_inputs, gradient)
    if not H.curved:
        return []
    inputs = [e.loss_inputs[k].detach() for k in H.curved]
    diagonal = [torch.zeros_like(x) for x in inputs]
    for _ in range(NUM_PROBES):
        u = [probe(x) for x in inputs]
        for d, ux, Hu in zip(diagonal, u, H(u)):
            d.addcmul_(ux, Hu.detach(), value=1.0 / NUM_PROBES)
    return [
        (edge(e.outputs[k]), d.abs().sqrt_() * draw(x))
        for k, d, x in zip(H.curved, diagonal, inputs)
    ]


def pulled_back(
    root: Sequence[tuple[Edge, Tensor]], inputs: Sequence[Tensor | Edge], *, keep: bool = False
) -> Sequence[Tensor | None]:
    """J's in `inputs`; None for zero."""
    if not root or not inputs:
        return [None] * len(inputs)
    targets: Any = [x if isinstance(x, Tensor) else GradientEdge(*x) for x in inputs]
    return grad(
        [GradientEdge(*e) for e, _ in root],
        targets,
        [s for _, s in root],
        retain_graph=keep,
        allow_unused=True,
    )
