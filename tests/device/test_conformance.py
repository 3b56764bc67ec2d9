"""What a device computes is what the CPU computes: products, steps, runs, ranks.

The default run takes every case, and every solver, preconditioner and damping rule once; all of them together
are `slow`. `make gpu-test` runs both on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import on_device
import pytest
import torch
from cases import CASES
from devices import BUILDING, DEVICES, environment, needs_standin, needs_two_gpus, on
from figures import note
from ranks import on_ranks

from hfdist.curvature.preconditioners import PRECONDITIONERS
from hfdist.optim.damping import DAMPING_RULES
from hfdist.optim.solvers import SOLVERS

pytestmark = pytest.mark.timeout(2 * BUILDING)
CPU = torch.device("cpu")
JOBS = Path(__file__).parents[2] / "deploy" / "jobs"

on_every_device = pytest.mark.parametrize("kind", DEVICES)


def same(kind: str, function: Any, *arguments: Any, tolerance: float | None = None) -> None:
    """The stand-in's kernels are the CPU's; a GPU's add up in another order."""
    expected = function(CPU, *arguments)
    bound = {"standin": 1e-12, "gpu": 1e-6}[kind] if tolerance is None else tolerance
    difference = on_device.difference(expected, on(kind, function, *arguments))
    note(difference=difference, bound=bound)
    assert difference <= bound


# -- products and gradients ------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_gradient_and_products_of_every_case(kind: str, curvature: str) -> None:
    names = [case.name for case in CASES if curvature == "ggn" or case.hessian]
    same(kind, on_device.products_of, names, curvature)


@on_every_device
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["double_backward", "recompute"])
@pytest.mark.parametrize("sizes", [(6,), (4, 2)], ids=["whole", "microbatched"])
def test_gradient_and_products_by_every_engine(kind: str, engine: str, sizes: Any) -> None:
    same(kind, on_device.products_of, [case.name for case in CASES], "ggn", engine, sizes)


# -- whole steps -----------------------------------------------------------------------------------

CHANGES: list[dict[str, Any]] = [
    *({"solver": name} for name in SOLVERS),
    *({"preconditioner": name} for name in PRECONDITIONERS),
    *({"damping_rule": name} for name in DAMPING_RULES),
    {"cg_iterates": "bfloat16"},
    {"cg_iterates": "host"},
    {"memory_budget": 0},
    {"capture_products": True},
    {"capture_products": True, "solver": "cg"},
    {"candidates_per_pass": 4, "curvature_opt": "hessian"},
    {"cg_residual_replacement": 3, "preset": "pytorch_hessianfree"},
]
ALL = [
    {"solver": solver, "preconditioner": preconditioner, "damping_rule": rule}
    for solver, preconditioner, rule in product(SOLVERS, PRECONDITIONERS, DAMPING_RULES)
]


@on_every_device
@pytest.mark.parametrize("case", ["linear-ce", pytest.param("dropout", marks=pytest.mark.slow)])
def test_steps_by_every_rule(kind: str, case: str) -> None:
    same(kind, on_device.steps_of, case, CHANGES)


@on_every_device
@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["conv", "batch-norm-train", "lstm", "attention", "embedding-tied"]
)
def test_steps_by_all_rules_together(kind: str, case: str) -> None:
    same(kind, on_device.steps_of, case, ALL)


@on_every_device
def test_a_loop_of_ones_own(kind: str) -> None:
    same(kind, on_device.own_loop)


# -- what GPUs have kernels of their own for ----------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("body", ["lstm", "attention"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_kernels_without_second_derivatives_are_avoided(
    kind: str, body: str, curvature: str
) -> None:
    """cuDNN's recurrent cells and the fused attentions have none."""
    losses = on(kind, on_device.losses_of, body, curvature)
    expected = on_device.losses_of(CPU, body, curvature)
    assert losses[-1] < losses[0]
    difference = on_device.difference(expected, losses)
    note(difference=difference)
    assert difference <= (1e-10 if kind == "standin" else 1e-5)


@on_every_device
def test_scalars_are_read_after_the_next_product_was_started(kind: str) -> None:
    """So the device never waits for the host within an iteration; the numbers are the same."""
    late, plain = on(kind, on_device.late_and_plain_solves)
    assert torch.equal(late["x"], plain["x"])
    assert late["num_products"] == plain["num_products"] + 1
    note(iterations=plain["iterations"])


# -- runs ------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize(
    "job",
    [
        "small_net",
        pytest.param("digits_classifier", marks=pytest.mark.slow),
        pytest.param("rosenbrock", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_checkpointed_resumed_and_drawn(kind: str, job: str, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("cpu", kind)]
    expected = on_device.train(CPU, job, folders[0])
    found = on(kind, on_device.train, job, folders[1])
    run_dir = Path(found.pop("run_dir"))
    del expected["run_dir"]
    assert on_device.difference(expected, found) <= (1e-12 if kind == "standin" else 1e-6)
    assert len(list((run_dir / "checkpoints").iterdir())) > 0
    assert list((run_dir / "plots").glob("*.png"))


@on_every_device
@pytest.mark.slow
def test_a_run_begun_on_a_device_goes_on_on_the_cpu(kind: str, tmp_path: Path) -> None:
    begun = on(kind, on_device.train, "small_net", str(tmp_path / "begun"))
    whole = on_device.train(CPU, "small_net", str(tmp_path / "whole"))
    found = on_device.resume(CPU, begun["run_dir"], 6)
    expected = on_device.resume(CPU, whole["run_dir"], 6)
    assert on_device.difference(expected, found) <= (1e-12 if kind == "standin" else 1e-6)


TWO = [
    pytest.param("standin", marks=needs_standin),
    pytest.param("gpu", marks=[pytest.mark.gpu, needs_two_gpus]),
]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks(kind: str, sharded: bool, tmp_path: Path) -> None:
    """The stand-in has no backend of `torch.distributed`: vectors are summed by way of the host."""
    on(kind, on_device.nothing)  # builds it
    changes = {"shard_solver_state": sharded, "solver": "cg", "preconditioner": "empirical_fisher"}
    expected = on_ranks(2, on_device.steps_of_rank, changes, timeout=BUILDING)
    found = on_ranks(2, on_device.steps_of_rank, changes, timeout=BUILDING, kind=kind)
    assert on_device.difference(expected, found) <= (1e-12 if kind == "standin" else 1e-6)


@pytest.mark.ranks
@pytest.mark.slow
@needs_standin
def test_two_workers_of_the_launcher(tmp_path: Path) -> None:
    on("standin", on_device.nothing)
    (tmp_path / "info").mkdir()
    known = {**os.environ, **environment(tmp_path / "info"), "OMP_NUM_THREADS": "1"}
    losses = []
    for device in ("cpu", "standin"):
        changes = [
            f"device={device}",
            "steps=2",
            "dtype=float64",
            "launch.workers=2",
            f"output={tmp_path}",
            "tracking.enabled=false",
        ]
        run = subprocess.run(
            [
                *(sys.executable, "-c", "from hfdist.cli import main; main()"),
                *("train", str(JOBS / "digits_classifier.yaml"), *changes, "--json"),
            ],
            env=known,
            capture_output=True,
            text=True,
            timeout=BUILDING,
        )
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout.splitlines()[-1])
        assert result["world_size"] == 2
        losses.append(result["final_loss"])
    # Not the same bits: on a device kfac's inverses come from triangular solves.
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
