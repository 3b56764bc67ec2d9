"""What a step asks of a device, counted on the stand-in: reads by the host, copies to it, memory.

A read makes the host wait for all that the device has been given; a copy from the host, too, unless it is
asked for in the background, and from pinned memory or small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import on_device
import pytest
from devices import BUILDING, needs_standin, on

from hfdist.curvature.preconditioners import PRECONDITIONERS
from hfdist.optim.solvers import SOLVERS

pytestmark = [pytest.mark.timeout(2 * BUILDING), needs_standin]

COUNTED = [name for name in SOLVERS if name not in ("dense", "sample_space")]  # those of large P
ROWS = 4  # vectors that a Krylov basis takes memory for at a time


def step(
    sizes: tuple[int, ...] = (6,), length: int = 6, layers: int = 2, **changes: Any
) -> dict[str, Any]:
    """Counts of a step of so many iterations."""
    lengths = {"cg_max_iter": length, "krylov_max_dim": length, "krylov_length": "full"}
    return on("standin", on_device.counted_step, sizes, {**lengths, **changes}, layers)


@pytest.mark.parametrize("preconditioner", ["none", "kfac", "ekfac", "ggn_diagonal"])
@pytest.mark.parametrize("solver", COUNTED)
def test_the_host_reads_once_an_iteration_and_nothing_large_is_allocated(
    solver: str, preconditioner: str
) -> None:
    changes = {"solver": solver, "preconditioner": preconditioner}
    short, long = (step(length=length, **changes) for length in (5, 11))
    more = long["iterations"] - short["iterations"]
    assert more == 6 or solver in ("steihaug", "metric")
    assert long["host_read"] - short["host_read"] <= more
    kept = 2 * (more // ROWS + 1) if solver in ("krylov", "auto") else 0  # the basis grows
    assert long["large"] - short["large"] <= kept


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_microbatches_cost_no_reads(preconditioner: str) -> None:
    changes = {"solver": "cg", "preconditioner": preconditioner, "memory_budget": 10**9}
    changes["preconditioner_examples"] = 1.0  # of every minibatch: a share takes other ones in each
    whole, cut = (step(sizes, **changes) for sizes in ((6,), (2, 2, 2)))
    assert (
        cut["host_read"] <= whole["host_read"]
    )  # (random vectors differ, so a candidate more or less)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_more_layers_cost_no_reads(preconditioner: str) -> None:
    """kfac looks twice at the statistics of a step, whatever their number."""
    changes = {"solver": "cg", "damping": 100.0, "preconditioner": preconditioner}
    few, many = (step(layers=layers, **changes) for layers in (2, 5))
    assert many["host_read"] == few["host_read"]
    if preconditioner == "kfac":
        none = step(layers=5, **{**changes, "preconditioner": "none"})
        assert many["host_read"] <= none["host_read"] + 2


@pytest.mark.parametrize("solver", COUNTED)
def test_no_step_waits_for_a_copy_from_the_host(solver: str) -> None:
    assert step(solver=solver).get("to_device", 0) == 0


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_no_preconditioner_waits_for_a_copy_from_the_host(preconditioner: str) -> None:
    assert step(solver="cg", preconditioner=preconditioner).get("to_device", 0) == 0


def test_a_run_copies_its_batches_and_little_else(tmp_path: Path) -> None:
    short, long = (
        on("standin", on_device.counted_run, "digits_classifier", str(tmp_path), steps)
        for steps in (2, 4)
    )
    assert long.get("to_device", 0) == short.get("to_device", 0)
    kind = "to_device_in_background_bytes"
    a_step = (long[kind] - short[kind]) / 2
    images = on_device.EXAMPLES * (64 * 4 + 8)  # float32 pixels, an int64 label
    assert images <= a_step <= images + 4096  # and the coordinates of candidates, say
