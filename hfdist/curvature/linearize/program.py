"""The linear map J of a forward pass, as a list of smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfdist.curvature.linearize.call import Map
from hfdist.curvature.linearize.generic import generic

REARRANGEMENTS = {
    f"aten::{name}"
    for name in (
        "view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "slice",
        "select", "squeeze", "unsqueeze", "alias", "clone", "split", "split_with_sizes", "unbind",
        "_to_copy", "index_select",
    )
}  # fmt: skip
"""Operations that move numbers about, whatever their values."""


@dataclass(kw_only=True)
class Step:
    """One map, and where its arguments and results lie."""

    map: Map
    inputs: list[int]
    outputs: list[int]
    aliases: bool
    name: str
    free: list[bool] | None = None
    """Which inputs nobody reads afterwards."""
    dead: list[int] | None = None
    """What to let go of afterwards."""


class Program:
    """v -> Jv; of the steps, only those that the outputs need are kept.

    Args:
        steps: In order of evaluation. Slots 0 .. len(sources) - 1 hold v.
        num_sources: Number of parameters.
        results: Slots of the outputs' tangents; None for an output without.
    """

    def __init__(
        self, steps: Sequence[Step], num_sources: int, results: Sequence[int | None]
    ) -> None:
        self.steps = _needed(steps, results)
        for step in self.steps:
            if isinstance(step.map, generic):
                step.map.prepare()
        self.results = results
        self._num_slots = 1 + max(
            [num_sources - 1, *(slot for step in steps for slot in step.outputs)]
        )
        _find_last_uses(self.steps, num_sources, {r for r in results if r is not None})

    @property
    def operations(self) -> list[str]:
        """Names of what is replayed."""
        return sorted({step.name for step in self.steps})

    @torch.no_grad()
    def __call__(self, v: Sequence[Tensor]) -> list[Tensor | None]:
        """Jv, a tensor an output; None for zero."""
        slots: list[Tensor | None] = [None] * self._num_slots
        slots[: len(v)] = v
        for step in self.steps:
            t = step.map([slots[i] for i in step.inputs], step.free)  # type: ignore[arg-type,misc]
            if isinstance(t, (tuple, list)):
                for slot, ti in zip(step.outputs, t):
                    slots[slot] = ti
            else:
                slots[step.outputs[0]] = t
            for i in step.dead:  # type: ignore[union-attr]
                slots[i] = None
        return [None if r is None else slots[r] for r in self.results]


def _needed(steps: Sequence[Step], results: Sequence[int | None]) -> list[Step]:
    wanted = {r for r in results if r is not None}
    kept = []
    for step in reversed(steps):
        if not wanted.isdisjoint(step.outputs):
            wanted.update(step.inputs)
            kept.append(replace(step))  # what is free and dead differs from program to program
    return kept[::-1]


def _find_last_uses(steps: Sequence[Step], num_sources: int, results: set[int]) -> None:
    """Which tangents may be overwritten where: those of which no alias is read later, and never v."""
    group: dict[int, int] = {}

    def of(slot: int) -> int:
        return group.get(slot, slot)

    for step in steps:
        if step.aliases:
            root = of(step.inputs[0])
            members = {root, *(of(i) for i in step.inputs), *step.outputs}
            for slot, g in list(group.items()):
                if g in members:
                    group[slot] = root
            group.update(dict.fromkeys(members, root))
    read_later = set(results)
    groups_later = {of(r) for r in results} | {of(i) for i in range(num_sources)}
    for step in reversed(steps):
        inputs = set(step.inputs)
        step.free = [of(i) not in groups_later and step.inputs.count(i) == 1 for i in step.inputs]
        # Two arguments of one storage: neither is free.
        roots = [of(i) for i in step.inputs]
        step.free = [f and roots.count(r) == 1 for f, r in zip(step.free, roots)]
        step.dead = list(inputs - read_later) + [o for o in step.outputs if o not in read_later]
        read_later |= inputs
        groups_later |= set(roots)
