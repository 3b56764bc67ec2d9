"""Seconds of a Hessian-free step on W ranks: an alpha-beta model, its fit, and what it foresees.

    T = 6 P n_g / (W F) + A(P) + k [8 P n_c / (W F) + (1 - overlap) A(P) + 40 P / M]
        + e [2 P n_l / (W F) + A(1)]
    A(P) = 2 (W - 1) a + 2 ((W - 1) / W) 4 P / B

A multiplication of a layer is 2 P n flops; a gradient is 3 of them, a Gauss-Newton product on kept
activations 4, a loss 1. The vectors of an iteration of conjugate gradients are read or written about ten
times, 4 bytes an element. A(P) is a ring's all-reduce (Thakur, Rabenseifner & Gropp 2005).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects two ranks."""

    latency: float
    """a: seconds a message."""
    bandwidth: float
    """B: bytes a second."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One rank's share of a machine, and the links between ranks."""

    flops: float
    """F: flop/s in the model's matrix products."""
    memory_bandwidth: float
    """M: bytes a second of vector arithmetic."""
    link: Link
    local: Link | None = None
    """Link inside a node of `ranks_per_node` ranks; reductions are then hierarchical."""
    ranks_per_node: int = 1

    def all_reduce(self, num_bytes: float, world_size: int) -> float:
        """Seconds of an all-reduce: a ring in each node, and a ring of nodes on 1/n of the data."""
        if self.local is None or self.ranks_per_node == 1:
            return _ring(num_bytes, world_size, self.link)
        inside = min(self.ranks_per_node, world_size)
        nodes = -(-world_size // self.ranks_per_node)
        return _ring(num_bytes, inside, self.local) + _ring(num_bytes / inside, nodes, self.link)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The work of one step."""

    num_parameters: int
    """P."""
    gradient: int
    curvature: int
    line_search: int
    """Global numbers of examples n_g, n_c, n_l."""
    cg_iterations: int
    """k."""
    loss_evaluations: int
    """e."""
    flops_per_example: float | None = None
    """Flops of a forward pass of one example; by default 2 P, a fully connected network's."""


def _ring(num_bytes: float, world_size: int, link: Link) -> float:
    hops = 2 * (world_size - 1)
    return hops * link.latency + hops / world_size * num_bytes / link.bandwidth


def seconds(step: Step, machine: Machine, world_size: int, overlap: float = 0.0) -> float:
    """T, in seconds.

    Args:
        step: The work.
        machine: The rates.
        world_size: W.
        overlap: Part of a product's reduction that is hidden behind the product, 0 to 1.
    """
    compute, vectors, reductions = _terms(step, machine, world_size)
    product = 4 * _forward(step) * step.curvature / (world_size * machine.flops)
    vector_reduction = machine.all_reduce(4.0 * step.num_parameters, world_size)
    # What is hidden cannot be longer than what hides it.
    hidden = min(overlap * vector_reduction, product) * step.cg_iterations
    return compute + vectors + reductions - hidden


def _forward(step: Step) -> float:
    return step.flops_per_example or 2.0 * step.num_parameters


def _terms(step: Step, machine: Machine, world_size: int) -> tuple[float, float, float]:
    examples = (
        3 * step.gradient
        + 4 * step.cg_iterations * step.curvature
        + step.loss_evaluations * step.line_search
    )
    compute = _forward(step) * examples / (world_size * machine.flops)
    vectors = step.cg_iterations * 40.0 * step.num_parameters / machine.memory_bandwidth
    reductions = (1 + step.cg_iterations) * machine.all_reduce(
        4.0 * step.num_parameters, world_size
    )
    reductions += step.loss_evaluations * machine.all_reduce(4.0, world_size)
    return compute, vectors, reductions


def efficiency(step: Step, machine: Machine, world_size: int, overlap: float = 0.0) -> float:
    """T(1) / (W T(W)): strong scaling, the same work on more ranks."""
    alone = seconds(step, machine, 1)
    return alone / (world_size * seconds(step, machine, world_size, overlap))


def weak_efficiency(step: Step, machine: Machine, world_size: int, overlap: float = 0.0) -> float:
    """T(1) / T(W) with W times the examples."""
    grown = replace(
        step,
        gradient=step.gradient * world_size,
        curvature=step.curvature * world_size,
        line_search=step.line_search * world_size,
    )
    return seconds(step, machine, 1) / seconds(grown, machine, world_size, overlap)


# -- fits --------------------------------------------------------------------------------------------


def fit_link(measured: Iterable[tuple[int, float, float]]) -> Link:
    """a and B from (world size, bytes, seconds) of all-reduces: least squares of relative errors.

    Raises:
        ValueError: There are fewer than two points with W > 1.
    """
    points = [(w, b, s) for w, b, s in measured if w > 1]
    if len(points) < 2:
        raise ValueError("a link is fitted to at least two all-reduces of two or more ranks")
    rows = [[2 * (w - 1) / s, 2 * (w - 1) / w * b / s] for w, b, s in points]
    latency, inverse_bandwidth = _positive_least_squares(rows, [1.0] * len(rows))
    return Link(latency=latency, bandwidth=1.0 / inverse_bandwidth)


def fit_rates(measured: Sequence[tuple[Step, float]]) -> tuple[float, float]:
    """F and M from (work, seconds) of steps of one rank, at two or more ratios of examples to P."""
    rows = []
    for step, s in measured:
        one = Machine(flops=1.0, memory_bandwidth=1.0, link=Link(latency=0.0, bandwidth=1.0))
        compute, vectors, _ = _terms(step, one, 1)
        rows.append([compute / s, vectors / s])
    inverse_flops, inverse_memory = _positive_least_squares(rows, [1.0] * len(rows))
    return 1.0 / inverse_flops, 1.0 / inverse_memory


def _positive_least_squares(
    rows: Sequence[Sequence[float]], target: Sequence[float]
) -> list[float]:
    """Least squares over positive coefficients; a rate that the data cannot tell from infinite is
    very large instead."""
    from scipy.optimize import nnls

    matrix = np.asarray(rows)
    scale = matrix.max(axis=0)
    coefficients, _ = nnls(matrix / scale, np.asarray(target))
    return [max(float(c / s), 1e-30) for c, s in zip(coefficients, scale)]
