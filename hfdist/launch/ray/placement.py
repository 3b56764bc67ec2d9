"""Whether workers fit on a cluster, and which resource is missing where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SLACK = 1e-6  # Ray counts resources in steps of 1e-4


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a run asks of a cluster."""

    num_workers: int
    """The fewest that the run may start with."""
    per_worker: Mapping[str, float]
    """Resources of one worker, by Ray's names: CPU, GPU, custom ones."""
    placement: str = "PACK"


def capacity(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers the nodes can hold at the same time.

    Args:
        demand: Resources of a worker and their placement.
        nodes: Resources of each node that is alive.
    """
    asked = {name: amount for name, amount in demand.per_worker.items() if amount > 0}
    if not asked:
        return demand.num_workers if nodes else 0
    fits = [
        int(min((node.get(name, 0.0) + _SLACK) // amount for name, amount in asked.items()))
        for node in nodes
    ]
    if demand.placement == "STRICT_PACK":
        return max(fits, default=0)
    if demand.placement == "STRICT_SPREAD":
        return sum(1 for fit in fits if fit)
    return sum(fits)


def what_is_missing(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Which resource is too scarce for the workers; None if they fit.

    Returns:
        One clause, such as "4 workers need 4 GPU (1 each), the cluster's 2 nodes have 2".
    """
    available = capacity(demand, nodes)
    if available >= demand.num_workers:
        return None
    workers = "1 worker needs" if demand.num_workers == 1 else f"{demand.num_workers} workers need"
    cluster = f"the cluster's {'1 node has' if len(nodes) == 1 else f'{len(nodes)} nodes have'}"
    short = []
    for name, amount in demand.per_worker.items():
        total = sum(node.get(name, 0.0) for node in nodes)
        if amount * demand.num_workers > total + _SLACK:
            each = f" ({_amount(amount)} each)" if demand.num_workers > 1 else ""
            short.append(
                f"{workers} {_amount(amount * demand.num_workers)} {_label(name)}{each}, "
                f"{cluster} {_amount(total)}"
            )
    if short:
        return "; ".join(short)
    for name, amount in demand.per_worker.items():
        largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if amount > largest + _SLACK:
            return (
                f"a worker needs {_amount(amount)} {_label(name)}, the cluster's largest node has "
                f"{_amount(largest)}"
            )
    bundle = ", ".join(f"{_amount(amount)} {_label(n)}" for n, amount in demand.per_worker.items())
    if demand.placement == "STRICT_PACK":
        return (
            f"{workers} one node with {bundle} each (launch.placement=STRICT_PACK), the largest node "
            f"can hold {available}"
        )
    if demand.placement == "STRICT_SPREAD":
        return (
            f"{workers} a node each with {bundle} (launch.placement=STRICT_SPREAD), {available} of the "
            f"cluster's {len(nodes)} nodes fit"
        )
    return f"{workers} {bundle} each, the cluster's nodes can hold {available}"


def suggest_fix(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> str:
    """What a person can do about it."""
    available = capacity(demand, nodes)
    fewer = f"lower launch.workers to {available}, " if available else ""
    return f"{fewer}ask for less (launch.cpus_per_worker, gpus_per_worker, resources), or add nodes"


def _label(name: str) -> str:
    kind, colon, value = name.partition(":")
    return f"{value} accelerators" if kind == "accelerator_type" and colon else name


def _amount(value: float) -> str:
    return f"{value:g}"
