"""Statistics of layers over examples, microbatches and ranks: one forward and half a backward pass each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfdist.curvature.loss_root import Draw, loss_root, pulled_back
from hfdist.curvature.microbatch import Microbatch
from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.layer_calls import LayerWatch, LinearCall


@dataclass(frozen=True, order=True)
class Layer:
    """A weight [out, in] that linear layers use, and their bias: places among the parameters."""

    weight: int
    bias: int  # -1: none

    @property
    def has_bias(self) -> bool:
        return self.bias >= 0


@dataclass(kw_only=True)
class Statistics:
    """Curvature by blocks, in units of the objective's."""

    layers: dict[Layer, tuple[Tensor, Tensor]]
    """A [in, in], with bias [in + 1, in + 1], and G [out, out]."""
    diagonals: dict[int, Tensor]
    """Of every other parameter, one random sample, shaped like it."""


@dataclass(kw_only=True)
class _Sums:
    """Sums over this rank's examples."""

    A: dict[int, Tensor] = field(default_factory=dict)  # [in + 1, in + 1]: sum of (x, 1)(x, 1)'
    G: dict[int, Tensor] = field(default_factory=dict)  # [out, out]: sum of gg'
    g: dict[int, Tensor] = field(default_factory=dict)  # [out]: sum of g, what a bias gets
    biases: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    others: dict[int, Tensor] = field(default_factory=dict)
    """J's of the parameters that were in no layer."""
    weight: float = 0.0

    def add_call(self, call: LinearCall, g: Tensor | None, dtype: torch.dtype) -> None:
        x = call.input.reshape(-1, call.input.shape[-1]).to(dtype)
        x = torch.cat((x, x.new_ones(len(x), 1)), 1)
        k, num_outputs = call.weight, call.num_outputs
        self.biases[k].add(-1 if call.bias is None else call.bias)
        _add(self.A, k, x.T @ x)
        if g is None:
            _add(self.G, k, x.new_zeros(num_outputs, num_outputs))
            _add(self.g, k, x.new_zeros(num_outputs))
            return
        g = g.reshape(-1, num_outputs).to(dtype)
        _add(self.G, k, g.T @ g)
        _add(self.g, k, g.sum(0))


def layer_statistics(problem: Problem, share: float) -> Statistics:
    """Statistics of a share of the gradient's examples. Collective: one reduction.

    Raises:
        DataError: The weights of these examples add up to nothing.
    """
    params = problem.params
    sums = _Sums()
    for microbatch in problem.roles.gradient:
        _add_microbatch(sums, problem, microbatch.part(share) if microbatch.part else microbatch)

    layers = _agreed(problem, sums)
    inside = {k for layer in layers for k in (layer.weight, layer.bias)}
    others = [k for k in range(len(params.tensors)) if k not in inside]
    parts: list[Tensor] = []

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=params.dtype, device=params.device)

    for layer in layers:
        num_outputs, num_inputs = params.tensors[layer.weight].shape
        A = sums.A.get(layer.weight, zeros(num_inputs + 1, num_inputs + 1))
        parts += [A, sums.G.get(layer.weight, zeros(num_outputs, num_outputs))]
    bias_sums = {b: sums.g[k] for k, biases in sums.biases.items() for b in biases if b >= 0}
    for k in others:
        found = sums.others.get(k, bias_sums.get(k))
        parts.append(zeros(*params.tensors[k].shape) if found is None else found)
    parts.append(torch.full((1,), sums.weight, dtype=params.dtype, device=params.device))
    flat = torch.cat([part.reshape(-1) for part in parts])
    problem.comm.all_reduce(flat)
    pieces = iter(flat.split([part.numel() for part in parts]))
    weight = float(flat[-1])
    problem.count_statistics(weight)
    scale = problem.scale(weight)
    found_layers = {}
    for layer in layers:
        num_outputs, num_inputs = params.tensors[layer.weight].shape
        A = next(pieces).view(num_inputs + 1, num_inputs + 1)
        G = next(pieces).view(num_outputs, num_outputs)
        rows = A[-1, -1].clamp(min=1.0)  # the number of uses
        if not layer.has_bias:
            A = A[:-1, :-1]
        found_layers[layer] = (A / rows, G * scale)
    diagonals = {k: next(pieces).square().mul_(scale).view(params.tensors[k].shape) for k in others}
    return Statistics(layers=found_layers, diagonals=diagonals)


def _add_microbatch(sums: _Sums, problem: Problem, microbatch: Microbatch) -> None:
    tensors = problem.params.tensors
    watch = LayerWatch(tensors)
    e = problem.evaluate_split(microbatch, watch)
    root = loss_root(e, Draw(microbatch.example_seeds, microbatch.seed))
    inside = {k for call in watch.calls for k in (call.weight, call.bias)}
    others = [k for k in range(len(tensors)) if k not in inside]
    found = pulled_back(
        root, [*(call.output for call in watch.calls), *(tensors[k] for k in others)]
    )
    with torch.no_grad():
        for call, g in zip(watch.calls, found):
            sums.add_call(call, g, problem.params.dtype)
        for k, v in zip(others, found[len(watch.calls) :]):
            if v is not None:
                _add(sums.others, k, v.to(problem.params.dtype))
    sums.weight += float(e.weight)


def _agreed(problem: Problem, sums: _Sums) -> list[Layer]:
    """What any rank has seen as a layer; a bias belongs to it if it is the layer's only one, and no other
    layer's."""
    biases: dict[int, set[int]] = defaultdict(set)
    for own in problem.comm.all_gather_object({k: sorted(b) for k, b in sums.biases.items()}):
        for k, found in own.items():
            biases[k].update(found)
    uses = [b for found in biases.values() for b in found]
    return [
        Layer(k, next(iter(found)) if len(found) == 1 and uses.count(min(found)) == 1 else -1)
        for k, found in sorted(biases.items())
    ]


def _add(sums: dict[int, Tensor], k: int, value: Tensor) -> None:
    sums[k] = sums[k].add_(value) if k in sums else value
