"""Work divided over ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balanced(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Indices of the items of each rank, ascending, of nearly equal total cost.

    The most expensive item first, each to the least loaded rank [Graham 1969]: no rank has more than 4/3
    of what the best division would give it. Equal costs go by index, equal loads by rank.
    """
    heap = [(0.0, rank) for rank in range(world_size)]
    items: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(heap)
        items[rank].append(index)
        heapq.heappush(heap, (load + costs[index], rank))
    return [sorted(mine) for mine in items]
