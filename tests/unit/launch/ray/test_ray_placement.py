"""Which resource is missing."""

from __future__ import annotations

import pytest

from hfdist.launch.ray.placement import Demand, capacity, suggest_fix, what_is_missing

SMALL = {"CPU": 2.0, "memory": 1e9}
LARGE = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0}


def demand(workers: int, placement: str = "PACK", **per_worker: float) -> Demand:
    return Demand(num_workers=workers, per_worker=per_worker, placement=placement)


@pytest.mark.parametrize(
    ("asked", "nodes", "held"),
    [
        (demand(1, CPU=1), [SMALL, SMALL], 4),
        (demand(1, CPU=1.5), [SMALL, SMALL], 2),
        (demand(1, CPU=0.1), [{"CPU": 0.3}], 3),  # not 2: amounts are decimal
        (demand(1, CPU=1, GPU=0.5), [SMALL, LARGE], 8),
        (demand(1, "STRICT_PACK", CPU=1), [SMALL, LARGE], 8),
        (demand(1, "STRICT_SPREAD", CPU=1), [SMALL, LARGE], 2),
        (demand(3), [SMALL], 3),
        (demand(3), [], 0),
    ],
)
def test_capacity(asked: Demand, nodes: list[dict[str, float]], held: int) -> None:
    assert capacity(asked, nodes) == held


@pytest.mark.parametrize(
    ("asked", "nodes", "words"),
    [
        (demand(4, CPU=1), [SMALL, SMALL], None),
        (demand(1, CPU=4), [SMALL], "1 worker needs 4 CPU, the cluster's 1 node has 2"),
        (
            demand(4, CPU=1, GPU=1),
            [SMALL, SMALL],
            "4 workers need 4 GPU (1 each), the cluster's 2 nodes have 0",
        ),
        (
            demand(1, CPU=3),
            [SMALL, SMALL],
            "a worker needs 3 CPU, the cluster's largest node has 2",
        ),
        (
            demand(3, "STRICT_SPREAD", CPU=1),
            [SMALL, LARGE],
            "3 workers need a node each with 1 CPU (launch.placement=STRICT_SPREAD), 2 of the "
            "cluster's 2 nodes fit",
        ),
        (
            demand(1, **{"accelerator_type:A100": 0.001}),
            [LARGE],
            "1 worker needs 0.001 A100 accelerators, the cluster's 1 node has 0",
        ),
        (
            demand(2, CPU=1.5, GPU=1),
            [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0}, {"GPU": 1.0}],
            "2 workers need 1.5 CPU, 1 GPU each, the cluster's nodes can hold 1",
        ),
    ],
)
def test_words(asked: Demand, nodes: list[dict[str, float]], words: str | None) -> None:
    assert what_is_missing(asked, nodes) == words


def test_the_mend_names_a_number_that_fits() -> None:
    assert suggest_fix(demand(9, CPU=1), [SMALL]).startswith("lower launch.workers to 2, ")
    assert suggest_fix(demand(9, CPU=3), [SMALL]).startswith("ask for less")
