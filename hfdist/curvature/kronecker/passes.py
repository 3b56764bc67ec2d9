"""A watched forward pass of a microbatch, and backward passes to what its layers returned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hfdist.curvature.kronecker.calls import LayerCall, VectorCall
from hfdist.curvature.kronecker.watch import LayerWatch, Shared
from hfdist.curvature.loss_root import Draw, Random, loss_root, pulled_back
from hfdist.curvature.microbatch import Microbatch
from hfdist.curvature.objective import Problem
from hfdist.curvature.outputs import Edge


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """One backward pass: g, the derivative of a random vector of the outputs in ..."""

    layers: list[tuple[LayerCall, Tensor]]
    """... results of layers,"""
    vectors: list[tuple[VectorCall, Tensor]]
    """... results of element-wise operations,"""
    others: list[tuple[int, Tensor]]
    """... parameters of no known layer, by their index. What nothing depends on is left out."""


class WatchedPass:
    """A forward pass.

    Args:
        problem: The objective.
        microbatch: Of it, or a part of one.
        shared: See `LayerWatch`.
    """

    def __init__(self, problem: Problem, microbatch: Microbatch, shared: Shared = "expand") -> None:
        self._tensors = problem.params.tensors
        self._seeds, self._seed = microbatch.example_seeds, microbatch.seed
        self.num_examples = None if self._seeds is None else len(self._seeds)
        watch = LayerWatch(self._tensors, self.num_examples, shared)
        self._evaluation = problem.evaluate_split(microbatch, watch)
        self.weight = float(self._evaluation.weight)
        self.layers, self.vectors = watch.layers, watch.vectors
        inside = {layer.key.rows.index for layer in self.layers}
        inside |= {layer.bias.index for layer in self.layers if layer.bias is not None}
        inside |= {k for vector in self.vectors for k in vector.key.params}
        self._others = [k for k in range(len(self._tensors)) if k not in inside]
        edges = [layer.output for layer in self.layers] + [v.output for v in self.vectors]
        self._inputs: list[Tensor | Edge] = [*edges, *(self._tensors[k] for k in self._others)]

    def draw(self, sample: int) -> Draw:
        """Random signs of a sample."""
        return Random(self._seeds, self._seed, sample)

    def pull(self, draw: Draw) -> Pulled:
        """A backward pass from s = S u, u drawn; the graph is kept."""
        root = loss_root(self._evaluation, draw, self.draw(-1))
        found = pulled_back(root, self._inputs, keep=True)
        end, m = len(self.layers), len(self.layers) + len(self.vectors)
        return Pulled(
            layers=[(layer, g) for layer, g in zip(self.layers, found[:end]) if g is not None],
            vectors=[(v, g) for v, g in zip(self.vectors, found[end:m]) if g is not None],
            others=[(k, g) for k, g in zip(self._others, found[m:]) if g is not None],
        )
