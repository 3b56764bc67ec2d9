"""What a device is measured by; `make gpu-test` prints it. No figure here is known of a GPU yet."""

from __future__ import annotations

import on_device
import pytest
import torch
from devices import BUILDING, DEVICES, needs_standin, on
from figures import note

pytestmark = pytest.mark.timeout(2 * BUILDING)


@pytest.mark.parametrize("kind", DEVICES)
@needs_standin
def test_the_host_waits_no_more_often_than_on_the_stand_in(kind: str) -> None:
    expected = on("standin", on_device.waits_of_a_step)
    try:
        found = on(kind, on_device.waits_of_a_step)
    except NotImplementedError as error:
        pytest.skip(str(error))
    note(waits=found, on_the_stand_in=expected)
    assert found <= expected


@pytest.mark.parametrize("kind", DEVICES)
def test_times_of_a_small_models_products(kind: str) -> None:
    """As a graph of kernels a product of a small model should take far less on a GPU."""
    found = on(kind, on_device.seconds_of_products)
    cpu = on_device.seconds_of_products(torch.device("cpu"))
    note(**{f"{name}_us": round(1e6 * seconds) for name, seconds in found.items()})
    note(on_the_cpu_us="/".join(f"{1e6 * seconds:.0f}" for seconds in cpu.values()))
    assert all(seconds > 0.0 for seconds in found.values())
