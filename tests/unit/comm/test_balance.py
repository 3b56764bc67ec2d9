"""Work divided over ranks."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfdist.comm.balance import balanced

COSTS = st.lists(st.integers(0, 50), max_size=6)


@given(costs=COSTS, world_size=st.integers(1, 3))
def test_no_rank_has_much_more_than_the_best_division(costs: list[int], world_size: int) -> None:
    items = balanced(costs, world_size)
    assert sorted(i for mine in items for i in mine) == list(range(len(costs)))
    assert all(mine == sorted(mine) for mine in items)
    largest = max(sum(costs[i] for i in mine) for mine in items)
    best = min(
        max(sum(c for c, r in zip(costs, ranks) if r == rank) for rank in range(world_size))
        for ranks in product(range(world_size), repeat=len(costs))
    )
    assert largest <= best * (4 / 3 - 1 / (3 * world_size)) + 1e-9


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_equal_costs_go_round(world_size: int) -> None:
    assert balanced([1.0] * 7, world_size) == [
        list(range(rank, 7, world_size)) for rank in range(world_size)
    ]
