"""A step that runs out of the host's memory, and the formulas of what a step takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfdist.curvature.memory import preconditioner_numbers, reserved_bytes
from hfdist.curvature.params import ParameterVector
from hfdist.devices import is_out_of_memory
from hfdist.errors import StepMemoryError
from hfdist.hessian_free import HessianFree
from hfdist.optim.memory import WORKING, kept_iterates, solver_vectors
from hfdist.optim.options import HFOptions
from hfdist.optim.solvers.cg import backtracking_grid

MORE_THAN_THERE_IS = 10**16


def test_what_says_that_there_is_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(MORE_THAN_THERE_IS)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, ["krylov_basis=host", "krylov_max_dim (below 50)", "memory_budget=0"]),
        ({"solver": "cg", "preconditioner": "none"}, ["cg_iterates=host", "shard_solver_state"]),
        ({"solver": "cg", "cg_iterates": "host", "memory_budget": 0}, ["acc_step"]),
        ({"solver": "cg", "preconditioner": "nystrom"}, ["nystrom_rank (below 20)"]),
    ],
)
@pytest.mark.parametrize("fails_at", [2, 4, 6])
def test_a_step_names_the_parts_and_what_to_set(
    settings: dict[str, Any], advice: list[str], fails_at: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    calls = 0

    def forward() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            torch.empty(MORE_THAN_THERE_IS)
        outputs = model(x)
        return nn.functional.mse_loss(outputs, y), outputs

    optimizer = HessianFree(model.parameters(), **settings)
    before = copy.deepcopy(model.state_dict())
    try:
        for _ in range(3):
            optimizer.step(forward)
            before = copy.deepcopy(model.state_dict())
        pytest.fail("no forward pass failed")
    except StepMemoryError as error:
        said = str(error)
    assert "ran out of memory on cpu in " in said
    assert "RuntimeError: [enforce fail" in said
    for part in advice:
        assert part in said
    if settings.get("cg_iterates") == "host":
        assert "cg_iterates=host" not in said.split("Set ")[1]
        assert "memory_budget" not in said.split("Set ")[1]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    optimizer.step(forward)  # there is enough now


@pytest.mark.parametrize("gamma", [1.1, 1.3, 2.0])
@pytest.mark.parametrize("longest", [1, 7, 250])
def test_kept_iterates_are_those_of_the_grid(gamma: float, longest: int) -> None:
    on_grid = backtracking_grid(gamma)
    assert kept_iterates(gamma, longest) == sum(on_grid(i) for i in range(longest + 1))


def test_the_solvers_vectors() -> None:
    def vectors(**changes: Any) -> float:
        return solver_vectors(HFOptions(**changes), 10**6)

    assert vectors(solver="cg", cg_iterates="host") == WORKING
    kept = kept_iterates(1.3, 250)
    assert vectors(solver="cg") == WORKING + kept
    assert vectors(solver="cg", cg_iterates="bfloat16") == WORKING + kept / 2
    assert vectors(krylov_max_dim=50) == WORKING + 104 + 21
    assert vectors(krylov_max_dim=50, secant_pairs=0) == WORKING + 104
    assert vectors(krylov_max_dim=50, structural_damping=1.0) == WORKING + 104
    assert vectors(krylov_basis="host") == WORKING
    assert vectors(krylov_basis="none") == WORKING + 22
    assert solver_vectors(HFOptions(solver="dense"), 100) == WORKING + 200
    assert solver_vectors(HFOptions(krylov_max_dim=50, secant_pairs=0), 3) == WORKING + 8


def test_reserved_bytes_of_a_layer() -> None:
    params = ParameterVector(nn.Linear(9, 5).parameters())
    options = HFOptions(solver="cg", cg_iterates="host")
    factors = 10**2 + 5**2 + 5**2  # of the weight, and the bias alone
    assert preconditioner_numbers(params, options) == 4 * factors + 2 * 50
    assert reserved_bytes(params, options) == 4 * (8 * 50 + 4 * factors + 2 * 50)
    corrected = HFOptions(preconditioner="ekfac")
    assert preconditioner_numbers(params, corrected) == 6 * factors + 5 * 50
    empty = ParameterVector(nn.Linear(9, 0).parameters())  # (what is wrong with it is said later)
    assert preconditioner_numbers(empty, options) == 4 * 10**2
    halves = HFOptions(
        solver="cg", cg_iterates="host", preconditioner="none", shard_solver_state=True
    )
    assert reserved_bytes(params, halves, world_size=2) == 4 * (8 * 25 + 2 * 50)
