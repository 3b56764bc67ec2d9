"""Products captured as graphs of kernels: equal to those without, and launched by few calls."""

from __future__ import annotations

from typing import Any

import on_device
import pytest
import torch
from devices import BUILDING, DEVICES, needs_standin, on

pytestmark = pytest.mark.timeout(2 * BUILDING)
needs_graphs = pytest.mark.skipif(
    not hasattr(torch.accelerator, "Graph"), reason="this torch has no graphs of the stand-in"
)


def products(kind: str, name: str, captures: bool = True) -> Any:
    return on(kind, on_device.captured_products, name, captures)


@pytest.mark.parametrize("kind", DEVICES)
@needs_graphs
def test_captured_products_are_those_without(kind: str) -> None:
    found, plain = (products(kind, "plain", captures) for captures in (True, False))
    assert found["said"] == []
    assert on_device.difference(plain["products"], found["products"]) <= 1e-12


@needs_standin
@needs_graphs
def test_a_captured_product_is_one_launch_beside_its_vectors() -> None:
    _, captured, third, fourth = products("standin", "plain")["counts"]
    _, plain, *_ = products("standin", "plain", captures=False)["counts"]
    assert third["replay"] == fourth["replay"] == 1
    assert captured["replay"] == 1  # the second time is captured, and run
    # v is copied in, and the result is put into its vector: 4 parameters of each.
    assert third["kernel"] == fourth["kernel"] < 0.7 * plain["kernel"]


@pytest.mark.parametrize("kind", DEVICES)
@needs_graphs
def test_a_program_that_the_host_reads_in_is_refused_with_the_reason(kind: str) -> None:
    found, plain = (products(kind, "masked", captures) for captures in (True, False))
    assert len(found["said"]) == 1
    assert found["said"][0].startswith("products are not captured as graphs: ")
    assert "captur" in found["said"][0].split(": ", 1)[1]
    assert on_device.difference(plain["products"], found["products"]) <= 1e-12


def test_a_device_without_graphs_and_an_engine_without_a_program() -> None:
    cpu = torch.device("cpu")
    for name, reason in (
        ("plain", "the device cpu has no graphs"),
        ("double_backward", "they are computed by double_backward"),
    ):
        found = on_device.captured_products(cpu, name, True)
        plain = on_device.captured_products(cpu, name, False)
        assert found["said"] == [f"products are not captured as graphs: {reason}"]
        assert on_device.difference(plain["products"], found["products"]) == 0.0
