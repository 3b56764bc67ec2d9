"""The alpha-beta model: its limits, its fit, what it foresees."""

from __future__ import annotations

import dataclasses

import pytest

from hfdist.bench.scaling import CLUSTERS, look_ahead
from hfdist.bench.scaling_model import (
    Link,
    Machine,
    Step,
    efficiency,
    fit_link,
    fit_rates,
    seconds,
    weak_efficiency,
)

STEP = Step(
    num_parameters=842_340,
    gradient=5000,
    curvature=2500,
    line_search=5000,
    cg_iterations=50,
    loss_evaluations=6,
)
MACHINE = Machine(flops=5e10, memory_bandwidth=1e10, link=Link(latency=2e-5, bandwidth=1e9))


def test_alone_there_is_no_communication() -> None:
    P = STEP.num_parameters
    expected = (6 * P * 5000 + 50 * 8 * P * 2500 + 6 * 2 * P * 5000) / 5e10 + 50 * 40 * P / 1e10
    assert seconds(STEP, MACHINE, 1) == pytest.approx(expected)
    assert efficiency(STEP, MACHINE, 1) == pytest.approx(1.0)


def test_a_ring_moves_twice_the_vector() -> None:
    W, P = 8, STEP.num_parameters
    assert MACHINE.all_reduce(4.0 * P, W) == pytest.approx(14 * 2e-5 + 14 / 8 * 4 * P / 1e9)


def test_fits_find_what_made_the_times() -> None:
    link = fit_link([(W, b, MACHINE.all_reduce(b, W)) for W in (2, 4) for b in (8, 1e5, 4e6)])
    assert link.latency == pytest.approx(2e-5)
    assert link.bandwidth == pytest.approx(1e9)
    steps = [dataclasses.replace(STEP, curvature=n, gradient=n) for n in (100, 400, 1600)]
    flops, memory = fit_rates([(step, seconds(step, MACHINE, 1)) for step in steps])
    assert (flops, memory) == (pytest.approx(5e10), pytest.approx(1e10))


def test_a_link_needs_two_points() -> None:
    with pytest.raises(ValueError, match="at least two"):
        fit_link([(1, 8, 1e-5), (2, 8, 1e-5)])


def test_overlap_helps_and_never_hides_more_than_the_product_takes() -> None:
    slow = dataclasses.replace(MACHINE, link=Link(latency=1.0, bandwidth=1e9))
    for machine in (MACHINE, slow):
        plain, overlapped = (seconds(STEP, machine, 64, overlap) for overlap in (0.0, 1.0))
        product = 8 * STEP.num_parameters * STEP.curvature / (64 * machine.flops)
        assert plain - 50 * product <= overlapped < plain


def test_efficiency_falls_with_ranks_and_weak_falls_slower() -> None:
    strong = [efficiency(STEP, MACHINE, W) for W in (1, 2, 8, 64)]
    weak = [weak_efficiency(STEP, MACHINE, W) for W in (1, 2, 8, 64)]
    assert strong == sorted(strong, reverse=True)
    assert all(w >= s for w, s in zip(weak, strong))


def test_looking_ahead_reaches_4096_ranks() -> None:
    tables = look_ahead()
    assert set(tables) == set(CLUSTERS)
    for rows in tables.values():
        assert rows[-1]["world_size"] == 4096
        assert all(0 < row["strong"] <= row["strong_overlap"] <= 1.0 + 1e-9 for row in rows)
