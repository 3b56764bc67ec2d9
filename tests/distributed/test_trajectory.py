"""The same job on 1, 2, 3 and 4 ranks: one trajectory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from rules import CG, DEFAULT
from torch import Tensor

from hfdist.checkpoint import CheckpointStore
from hfdist.comm import Communicator, SerialCommunicator
from hfdist.config.job import RunConfig, from_dict
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, run

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

STEPS = 8
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"task": "rank_tasks:Mlp"},
    "mlp_default": {"task": "rank_tasks:Mlp", "optim": DEFAULT, "batches": {"curvature": "auto"}},
    # Whole batches: after the first solves steps are made of steps.
    "mlp_secants": {
        "task": "rank_tasks:Mlp",
        "optim": DEFAULT,
        "batches": {"gradient": None, "line_search": None},
    },
    "conv_default": {"task": "rank_tasks:Conv", "optim": DEFAULT},
    "conv_ekfac": {
        "task": "rank_tasks:Conv",
        "optim": {**DEFAULT, "preconditioner": "ekfac"},
        "batches": {"microbatch": 4},
    },
    "mlp_hessian": {"task": "rank_tasks:Mlp", "optim": {"curvature_opt": "hessian"}},
    "mlp_preconditioned": {
        "task": "rank_tasks:Mlp",
        "optim": {"preconditioner": "empirical_fisher"},
    },
    "mlp_dropout": {
        "task": "rank_tasks:Mlp",
        "task_args": {"dropout": 0.4},
        "batches": {"microbatch": 4},
    },
    "conv": {"task": "rank_tasks:Conv"},
    "transformer": {
        "task": "hfdist.tasks.sequences:TextTransformer",
        "task_args": {"examples": 41, "evaluation": 0, "width": 8, "layers": 1, "length": 12},
    },
    "lstm": {
        "task": "hfdist.tasks.sequences:LSTMAddition",
        "task_args": {"examples": 41, "evaluation": 7, "hidden": 4, "length": 8},
    },
}


def config_of(case: str, output: str, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "steps": STEPS,
        "dtype": "float64",
        "output": output,
        # Few iterations: long solves amplify the rounding of another order of summation.
        "optim": {**CG, "cg_max_iter": 6, "krylov_max_dim": 6, "weight_decay": 1e-3},
        "batches": {"gradient": 23, "curvature": 10, "line_search": 13},
        "checkpoint": {"every": 100},
        "tracking": {"enabled": False},
    }
    for overrides in (CASES[case], changes):
        for key, value in overrides.items():
            merged = {**values.get(key, {}), **value} if isinstance(value, dict) else value
            values[key] = merged
    return from_dict(values)


def train(
    comm: Communicator, config: RunConfig, run_dir: Path, resume: bool = False
) -> dict[str, Any]:
    job = Job(config=config, run_dir=run_dir, resume=resume)
    return run(job, comm, QuietDisplay())


def parameters(config: RunConfig, run_dir: Path) -> dict[str, Tensor]:
    store = CheckpointStore(run_dir / "checkpoints", config.checkpoint, SerialCommunicator())
    return store.load()[1]["model"]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Greatest difference, relative to the greatest parameter."""
    largest = max(float(t.abs().max()) for t in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def of(case: str) -> dict[str, Tensor]:
        folder = tmp_path_factory.mktemp(f"serial_{case}")
        config = config_of(case, str(folder))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        (folder / "run").mkdir()
        train(SerialCommunicator(), config, folder / "run")
        torch.set_num_threads(threads)
        return parameters(config, folder / "run")

    return of


@pytest.mark.parametrize(
    ("case", "world_size"),
    [(case, 2) for case in CASES]
    + [("lstm", 3), ("conv_ekfac", 3), ("mlp", 4), ("conv_default", 4)]
    + [
        pytest.param(case, 4, marks=pytest.mark.slow)
        for case in sorted(set(CASES) - {"mlp", "conv_default"})
    ],
)
def test_ranks_follow_the_serial_trajectory(
    case: str, world_size: int, serial: Any, tmp_path: Path
) -> None:
    config = config_of(case, str(tmp_path))
    (tmp_path / "run").mkdir()
    results = on_ranks(world_size, train, config, tmp_path / "run", timeout=120)
    # Ranks are bitwise equal (the worker compares them after every step, too).
    assert len({result["parameters_sha256"] for result in results}) == 1
    assert distance(serial(case), parameters(config, tmp_path / "run")) < 1e-10
    without_products = [record["products"] == 0 for record in records(tmp_path / "run")]
    assert any(without_products) == (case == "mlp_secants")


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "case",
    [
        "mlp_default",
        "mlp_secants",
        "conv",
        "mlp_preconditioned",
        "conv_ekfac",
        pytest.param("mlp", marks=pytest.mark.slow),
        pytest.param("conv_default", marks=pytest.mark.slow),
    ],
)
def test_shards_follow_the_serial_trajectory(
    case: str, world_size: int, serial: Any, tmp_path: Path
) -> None:
    config = config_of(
        case, str(tmp_path), optim={**CASES[case].get("optim", {}), "shard_solver_state": True}
    )
    (tmp_path / "run").mkdir()
    on_ranks(world_size, train, config, tmp_path / "run", timeout=120)
    assert distance(serial(case), parameters(config, tmp_path / "run")) < 1e-10


def test_one_vector_reduction_an_iteration_and_no_scalar_one(tmp_path: Path) -> None:
    counted = {}
    for iterations in (3, 9):
        optim = {
            "cg_max_iter": iterations,
            "cg_stop": "residual",
            "cg_tol": 0.0,
            "cg_decay_x0": 0.0,
            "use_cg_backtracking": False,
            "use_linesearch": False,
            "damping": 100.0,
        }
        config = config_of("conv", str(tmp_path), steps=3, optim=optim)
        run_dir = tmp_path / str(iterations)
        run_dir.mkdir()
        on_ranks(2, train, config, run_dir)
        counted[iterations] = records(run_dir)[1:]
    for few, many in zip(counted[3], counted[9]):
        assert (few["cg_iterations"], many["cg_iterations"]) == (3, 9)
        assert few["communication/vector_sums"] == 1 + 3  # the gradient, and the products
        assert many["communication/vector_sums"] == 1 + 9
        assert few["communication/scalar_sums"] == many["communication/scalar_sums"]
        assert few["communication/object_calls"] == many["communication/object_calls"]


@pytest.mark.parametrize("shard_solver_state", [False, True])
def test_candidates_that_are_evaluated_together_share_a_reduction(
    shard_solver_state: bool, tmp_path: Path
) -> None:
    found = {}
    for at_once in (1, 8):
        optim = {
            "cg_max_iter": 6,
            "weight_decay": 1e-3,
            "shard_solver_state": shard_solver_state,
            "candidates_per_pass": at_once,
        }
        config = config_of("mlp", str(tmp_path), optim=optim)
        run_dir = tmp_path / str(at_once)
        run_dir.mkdir()
        ranks = on_ranks(2, train, config, run_dir)
        steps = records(run_dir)
        reductions = sum(r["communication/scalar_sums"] for r in steps)
        found[at_once] = ranks[0]["parameters_sha256"], reductions
    assert found[1][0] == found[8][0]
    assert found[8][1] < 0.4 * found[1][1]


@pytest.mark.parametrize(
    "rules",
    [
        {"cg_max_iter": 20, "cg_stop": "residual", "cg_tol": 0.0},
        {**DEFAULT, "krylov_length": "full", "krylov_max_dim": 20},
    ],
    ids=["cg", "krylov"],
)
def test_sharded_memory_and_reductions(rules: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for world_size, is_sharded in ((1, False), (2, False), (2, True), (4, True)):
        optim = {**rules, "shard_solver_state": is_sharded}
        config = config_of("conv", str(tmp_path), steps=3, optim=optim)
        run_dir = tmp_path / f"{world_size}{is_sharded}"
        run_dir.mkdir()
        on_ranks(world_size, train, config, run_dir)
        found[world_size, is_sharded] = max(r["solver_bytes"] for r in records(run_dir))
    assert found[2, False] == found[1, False]
    assert found[2, True] <= 1.2 / 2 * found[1, False]
    assert found[4, True] <= 1.2 / 4 * found[1, False]


@pytest.mark.parametrize(
    ("first", "second", "case"),
    [
        (3, 1, "mlp"),
        (1, 2, "mlp"),
        (2, 4, "mlp"),
        (2, 1, "mlp_default"),
        (1, 2, "mlp_default"),
        (3, 2, "conv_ekfac"),
    ],
)
def test_a_run_goes_on_at_another_world_size(
    first: int, second: int, case: str, serial: Any, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    half = config_of(case, str(tmp_path), steps=3)
    on_ranks(first, train, half, tmp_path / "run")
    whole = config_of(case, str(tmp_path))
    on_ranks(second, train, whole, tmp_path / "run", True)
    assert distance(serial(case), parameters(whole, tmp_path / "run")) < 1e-10
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(STEPS))


@pytest.mark.parametrize("case", ["mlp", "mlp_default"])
def test_more_ranks_than_examples(case: str, tmp_path: Path, serial: Any) -> None:
    """Ranks with nothing take part, and change nothing."""
    results = []
    for world_size in (1, 4):
        config = config_of(
            case,
            str(tmp_path),
            steps=5,
            batches={"gradient": 3, "curvature": 2, "line_search": None},
        )
        run_dir = tmp_path / str(world_size)
        run_dir.mkdir()
        on_ranks(world_size, train, config, run_dir)
        results.append(parameters(config, run_dir))
    assert distance(*results) < 1e-10


@pytest.mark.parametrize("shard_solver_state", [False, True])
def test_products_rounded_on_the_wire(shard_solver_state: bool, tmp_path: Path) -> None:
    """Half of the traffic or less, ranks still bitwise equal, and the same place in the end."""
    found = {}
    for dtype in ("full", "bfloat16"):
        optim = {
            "cg_max_iter": 12,
            "cg_stop": "residual",
            "cg_tol": 0.0,
            "reduction_dtype": dtype,
            "cg_residual_replacement": None if dtype == "full" else 6,
            "shard_solver_state": shard_solver_state,
        }
        config = config_of("conv", str(tmp_path), steps=8, dtype="float32", optim=optim)
        run_dir = tmp_path / dtype
        run_dir.mkdir()
        results = on_ranks(2, train, config, run_dir)
        assert len({result["parameters_sha256"] for result in results}) == 1
        found[dtype] = records(run_dir)
    kind = "reduce_scatter_bytes" if shard_solver_state else "sum_bytes"
    full, rounded = (
        found[dtype][0][f"communication/{kind}"] / found[dtype][0]["products"]
        for dtype in ("full", "bfloat16")
    )
    assert rounded < 0.75 * full  # two of fourteen products, and the gradient, are not rounded
    ends = [found[dtype][-1]["final_loss"] for dtype in ("full", "bfloat16")]
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)
