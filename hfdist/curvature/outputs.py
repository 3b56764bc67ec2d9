"""The tensors in a model's outputs, whatever holds them, and how the loss hangs on them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Edge = tuple[Any, int]
"""A node of autograd's graph, and which of its outputs: a tensor as it was when the edge was taken, also if
it was changed in place since."""


def differentiable_tensors(outputs: Any) -> list[Tensor]:
    """The tensors with a graph in a model's outputs: any pytree, mapping or data class; each once."""
    found: dict[int, Tensor] = {}
    for tensor in _tensors(outputs):
        if tensor.requires_grad:
            found.setdefault(id(tensor), tensor)
    return list(found.values())


def _tensors(outputs: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(dict(leaf))
        elif _is_data(leaf):
            yield from _tensors(vars(leaf))


def replaced(outputs: Any, copies: Mapping[int, Tensor]) -> Any:
    """The same outputs with tensors exchanged, by their id; containers are copied, not changed."""

    def exchange(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return copies.get(id(leaf), leaf)
        is_mapping = isinstance(leaf, Mapping)
        if not is_mapping and not _is_data(leaf):
            return leaf
        twin = copy.copy(leaf)
        if is_mapping:
            for key, value in leaf.items():
                twin[key] = replaced(value, copies)
        for name, value in list(getattr(leaf, "__dict__", {}).items()):
            object.__setattr__(twin, name, replaced(value, copies))
        return twin

    return tree_map(exchange, outputs)


def _is_data(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def reached_first(loss: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs that the loss is a function of: those that its graph meets before any other output.

    Of hidden states beside logits, say, only the logits count, through which the loss sees them.

    Raises:
        ValueError: Such an output is computed from another one: partial derivatives of the loss in
            them cannot be told apart.
    """
    edges = [edge(z) for z in outputs]
    met = _meet([edge(loss)], set(edges))
    direct = [z for z, e in zip(outputs, edges) if e in met]
    if any(is_computed_from(z, direct) for z in direct):
        raise ValueError(
            "the loss depends on outputs that depend on each other: return from forward() only "
            "the one that all others are computed from, or use acc_step or a Task, whose loss is "
            "a function of the outputs"
        )
    return direct


def is_computed_from(output: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether an output's graph meets that of another one."""
    own = edge(output)
    goals = {e for e in map(edge, others) if e != own}
    return output.grad_fn is not None and bool(_meet(list(output.grad_fn.next_functions), goals))


def are_nested(outputs: Sequence[Tensor]) -> bool:
    """Whether any of them is computed from another one."""
    return len(outputs) > 1 and any(is_computed_from(z, outputs) for z in outputs)


def is_reached(
    loss: Tensor, inputs: Sequence[Tensor], without: Sequence[Tensor | Edge] = ()
) -> bool:
    """Whether the loss depends on any of `inputs` other than through `without`."""
    goals = {edge(t) for t in inputs if t.requires_grad}
    ends = {edge(t) if isinstance(t, Tensor) else t for t in without}
    return bool(goals & _meet([edge(loss)], goals | ends))


def outermost(loss: Tensor, edges: Sequence[Edge], inside: Sequence[Edge | None]) -> list[int]:
    """Which of these edges a walk from the loss meets first.

    Args:
        loss: A scalar.
        edges: Results of functions.
        inside: Of each function, the edge of its argument where the walk is to go on beyond it.
    """
    number = {e: k for k, e in enumerate(edges)}
    found: list[int] = []
    waiting, seen = [edge(loss)], set[Edge]()
    while waiting:
        met = _meet(waiting, set(number) - seen)
        seen |= met
        found += [number[e] for e in met]
        waiting = [e for e in (inside[number[m]] for m in met) if e is not None]
    return sorted(found)


def edge(tensor: Tensor) -> Edge:
    """Where a tensor stands in autograd's graph now."""
    if tensor.grad_fn is None:  # a leaf: the node that would accumulate its gradient
        with torch.enable_grad():
            node = tensor.view_as(tensor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        return node, 0
    return tensor.grad_fn, tensor.output_nr


def meets_a_leaf(tensor: Tensor, without: Sequence[Tensor]) -> bool:
    """Whether a tensor depends on any leaf of its graph other than through `without`."""
    seen = {edge(t) for t in without}
    waiting = [edge(tensor)]
    while waiting:
        e = waiting.pop()
        if e[0] is None or e in seen:
            continue
        seen.add(e)
        if not e[0].next_functions:
            return True
        waiting += e[0].next_functions
    return False


def is_met(start: Edge, goals: set[Edge]) -> bool:
    """Whether a walk from an edge towards the leaves meets one of the goals."""
    return bool(_meet([start], goals))


def _meet(start: Sequence[Edge], goals: set[Edge]) -> set[Edge]:
    """The goals that a walk from `start` towards the leaves meets; it does not go beyond a goal."""
    met: set[Edge] = set()
    seen: set[Edge] = set()
    waiting = list(start)
    while waiting:
        e = waiting.pop()
        if e[0] is None or e in seen:
            continue
        seen.add(e)
        if e in goals:
            met.add(e)
        else:
            waiting += e[0].next_functions
    return met
