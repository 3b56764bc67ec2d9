"""The tensors in a model's outputs, whatever holds them, and how the loss hangs on them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_Place = tuple[Any, int]  # a node of the graph, and which of its outputs


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
    places = [_place(z) for z in outputs]
    met = _meet([_place(loss)], set(places))
    direct = [(z, place) for z, place in zip(outputs, places) if place in met]
    for z, place in direct if len(direct) > 1 else []:
        others = {p for _, p in direct if p != place}
        if z.grad_fn is not None and _meet([(n, i) for n, i in z.grad_fn.next_functions], others):
            raise ValueError(
                "the loss depends on outputs that depend on each other: return from forward() only "
                "the one that all others are computed from, or use acc_step or a Task, whose loss is "
                "a function of the outputs"
            )
    return [z for z, _ in direct]


def is_reached(loss: Tensor, inputs: Sequence[Tensor], without: Sequence[Tensor]) -> bool:
    """Whether the loss depends on any of `inputs` other than through the tensors `without`."""
    goals = {_place(t) for t in inputs}
    return bool(goals & _meet([_place(loss)], goals | {_place(t) for t in without}))


def _place(tensor: Tensor) -> _Place:
    if tensor.grad_fn is None:  # a leaf: its place is the node that would accumulate its gradient
        node = tensor.view_as(tensor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        return node, 0
    return tensor.grad_fn, tensor.output_nr


def _meet(start: Sequence[_Place], goals: set[_Place]) -> set[_Place]:
    """The goals that a walk from `start` towards the leaves meets; it does not go beyond a goal."""
    met: set[_Place] = set()
    seen: set[_Place] = set()
    waiting = list(start)
    while waiting:
        place = waiting.pop()
        if place[0] is None or place in seen:
            continue
        seen.add(place)
        if place in goals:
            met.add(place)
        else:
            waiting += place[0].next_functions
    return met
