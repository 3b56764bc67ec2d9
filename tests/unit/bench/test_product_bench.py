"""The product and step benchmarks, on a workload small enough to run in a blink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hfdist.bench import products, steps, workloads
from hfdist.bench.workloads import Autoencoder, Workload
from hfdist.cli.bench import app


class Tiny(Autoencoder):
    widths = (784, 6, 784)


REAL_WORKLOADS = workloads.workloads()


def tiny() -> list[Workload]:
    return [
        Workload(
            name="tiny",
            description="for tests",
            task=Tiny(),
            batch=lambda: (torch.rand(16, 784).round(),),
        )
    ]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "workloads", tiny)
    monkeypatch.setattr(steps, "workloads", tiny)


def test_products_are_timed_and_checked_against_backpack(tmp_path: Path) -> None:
    timings = products.run(repetitions=2, threads=1)
    by_name = {(t.product, t.by): t for t in timings}
    assert by_name["gradient", "torch"].gradients == 1.0
    for engine in products.GGN_ENGINES:
        assert by_name["ggn", engine].error < 1e-4
        assert by_name["ggn", engine].seconds > 0
    assert by_name["hessian", "double_backward"].error < 1e-4
    assert products.plot(timings, tmp_path / "products.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="tiny"):
        products.run(["huge"])


def test_steps_are_timed_at_equal_cg_iterations() -> None:
    timings = steps.run(repetitions=1, cg_iterations=3, minibatches=(1, 4), memory=False)
    assert {(t.kind, t.by) for t in timings} == {
        (kind, by) for kind in ("step", "acc_step on 4") for by in ("hfdist", "backpack")
    }
    ours = next(t for t in timings if t.by == "hfdist")
    assert {"gradient", "cg", "total"} <= set(ours.phases)
    assert 0 < ours.solver_share < 1


def test_bench_products_prints_json() -> None:
    result = CliRunner().invoke(app, ["products", "--repetitions", "1", "--json"])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert {row["workload"] for row in rows} == {"tiny"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("autoencoder", 2_837_314), ("all-cnn-c", 1_387_108), ("resnet-18", 11_181_642),
     ("transformer", 3_448_320)],
)  # fmt: skip
def test_workloads_are_what_their_tables_say(name: str, parameters: int) -> None:
    workload = next(w for w in REAL_WORKLOADS if w.name == name)
    with torch.device("meta"):
        model: nn.Module = workload.task.model()
    assert sum(p.numel() for p in model.parameters()) == parameters
