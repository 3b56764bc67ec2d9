"""Which parameters have a block of the curvature together, and of what form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, order=True)
class Rows:
    """Rows of a parameter: all of them, or those that one use takes of a packed one."""

    index: int
    """Of the parameter."""
    start: int
    stop: int


@dataclass(frozen=True, order=True)
class KroneckerKey:
    """A use of a weight by a layer; its block is A x G."""

    rows: Rows
    num_inputs: int
    """Of one group."""
    num_outputs: int
    """Of one group."""
    input_first: bool = False
    """It is stored as [in, out], not [out, in]."""
    groups: int = 1
    """Of a grouped convolution; each has its own factors."""
    is_one_hot: bool = False
    """Its inputs are indices (an embedding)."""


@dataclass(frozen=True, order=True)
class VectorKey:
    """Parameters that act on numbers one by one (gains, biases, positions)."""

    params: tuple[int, ...]
    """Their indices; of a normalisation, gain and bias."""
    numel: int
    """Of each."""
    is_diagonal: bool = False
    """No more than the diagonal is known."""


@dataclass(kw_only=True)
class Seen:
    """What forward passes went through."""

    layers: dict[KroneckerKey, set[Rows | None]] = field(default_factory=dict)
    """The biases that a weight was used with; None: without."""
    vectors: set[VectorKey] = field(default_factory=set)

    def add(self, key: KroneckerKey, bias: Rows | None) -> None:
        self.layers.setdefault(key, set()).add(bias)

    def includes(self, other: Seen) -> bool:
        """Whether there is nothing new in what another pass went through."""
        return other.vectors <= self.vectors and all(
            biases <= self.layers.get(key, set()) for key, biases in other.layers.items()
        )

    def update(self, other: Seen) -> None:
        """Add what other ranks saw."""
        for key, biases in other.layers.items():
            self.layers.setdefault(key, set()).update(biases)
        self.vectors |= other.vectors


@dataclass(frozen=True)
class LayerBlock:
    """A weight's block."""

    keys: tuple[KroneckerKey, ...]
    """One, or two where the weight is used both ways round (tied embeddings): their statistics are added."""
    bias: Rows | None = None
    """What joins the weight as one more input."""


@dataclass(kw_only=True)
class BlockPlan:
    """Who has which block: every parameter has one."""

    layers: list[LayerBlock] = field(default_factory=list)
    vectors: list[VectorKey] = field(default_factory=list)
    biases: dict[int, list[KroneckerKey]] = field(default_factory=dict)
    """Biases that join no weight, as several layers share them, and these layers."""
    others: list[int] = field(default_factory=list)
    """Parameters of no known layer: a multiple of the identity each."""

    @property
    def keys(self) -> list[KroneckerKey]:
        """Layers whose statistics are wanted."""
        return [key for layer in self.layers for key in layer.keys]


def plan_blocks(seen: Seen, tensors: Sequence[Tensor]) -> BlockPlan:
    """Divide the parameters over blocks: first the weights, then their biases, then the rest."""
    plan = BlockPlan()
    covered: set[int] = set()
    by_weight: dict[int, list[KroneckerKey]] = defaultdict(list)
    for key in sorted(seen.layers):
        by_weight[key.rows.index].append(key)
    chosen: list[tuple[KroneckerKey, ...]] = []
    for index, keys in by_weight.items():
        found = _tiling(keys, tensors[index].shape[0])
        chosen += found
        covered.update({index} if found else ())

    users: dict[int, list[tuple[Rows, KroneckerKey]]] = defaultdict(list)
    for together in chosen:
        for key in together:
            for bias in seen.layers[key]:
                if bias is not None and bias.index not in covered:
                    users[bias.index].append((bias, key))
    joint: dict[KroneckerKey, Rows] = {}
    alone = {keys[0] for keys in chosen if len(keys) == 1}
    for index, uses in users.items():
        owners = _owners(uses, tensors[index].numel())
        if owners and all(key in alone and seen.layers[key] == {bias} for bias, key in owners):
            joint.update({key: bias for bias, key in owners})
            covered.add(index)
        elif all(bias.stop - bias.start == tensors[index].numel() for bias, _ in uses):
            plan.biases[index] = [key for _, key in uses]
            covered.add(index)
    plan.layers = [LayerBlock(keys, joint.get(keys[0])) for keys in chosen]
    for vector in sorted(seen.vectors):
        if covered.isdisjoint(vector.params):
            plan.vectors.append(vector)
            covered.update(vector.params)
    plan.others = [k for k in range(len(tensors)) if k not in covered]
    return plan


def _tiling(keys: Sequence[KroneckerKey], num_rows: int) -> list[tuple[KroneckerKey, ...]]:
    """The keys of one weight, those of the same rows together: of the whole weight, if there are any; else
    they must cover it once. Nothing, if they do not."""
    if len({key.groups for key in keys}) > 1:
        return []
    whole = tuple(key for key in keys if key.rows.stop - key.rows.start == num_rows)
    if whole:
        return [whole]
    by_start: dict[int, list[KroneckerKey]] = defaultdict(list)
    for key in keys:
        by_start[key.rows.start].append(key)
    end = 0
    for start, together in sorted(by_start.items()):
        if start != end or len({key.rows for key in together}) > 1:
            return []
        end = together[0].rows.stop
    return [tuple(together) for _, together in sorted(by_start.items())] if end == num_rows else []


def _owners(
    uses: Sequence[tuple[Rows, KroneckerKey]], numel: int
) -> list[tuple[Rows, KroneckerKey]]:
    """Which layer each part of a bias belongs to; nothing, if one part is several layers'."""
    ordered = sorted(set(uses))
    starts = [bias.start for bias, _ in ordered]
    stops = [bias.stop for bias, _ in ordered]
    return ordered if starts == [0, *stops[:-1]] and stops[-1] == numel else []
