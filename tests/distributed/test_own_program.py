"""HessianFree in a program of the user's own that has initialised torch.distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from hfdist.comm import Communicator
from hfdist.hessian_free import HessianFree

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

N = 23


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(N, 5).double(), torch.randint(3, (N,))


def train(comm: Communicator | None, wrapped: bool, call: str, options: dict[str, Any]) -> Any:
    """Five steps on this rank's shard; the losses and the parameters."""
    model, x, y = problem()
    rank, world_size = (0, 1) if comm is None else (comm.rank, comm.world_size)
    mine = slice(rank, None, world_size)
    net = nn.parallel.DistributedDataParallel(model) if wrapped else model
    # Closures do not say which examples they see: a metric's random signs depend on the cut.
    rules = {"damping": 0.3, "cg_max_iter": 8, "preconditioner": "none", **options}
    optimizer = HessianFree(net.parameters(), **rules)

    def forward() -> tuple[Tensor, Tensor, int]:
        outputs = net(x[mine])
        return nn.functional.cross_entropy(outputs, y[mine]), outputs, len(x[mine])

    losses = []
    for _ in range(5):
        if call == "step":
            losses.append(optimizer.step(forward))
        else:
            pairs = list(zip(x[mine].split(3), y[mine].split(3)))
            losses.append(optimizer.acc_step(net, nn.CrossEntropyLoss(), pairs))
    return losses, [p.detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "ddp"])
@pytest.mark.parametrize("call", ["step", "acc_step"])
def test_ranks_do_what_one_process_does(world_size: int, wrapped: bool, call: str) -> None:
    expected, parameters = train(None, False, call, {})
    for losses, found in on_ranks(world_size, train, wrapped, call, {}):
        assert losses == pytest.approx(expected, rel=1e-10)
        for p, q in zip(parameters, found):
            assert abs(p - q).max() < 1e-10


def test_solver_state_may_be_sharded() -> None:
    expected, _ = train(None, False, "step", {})
    answers = on_ranks(2, train, True, "step", {"shard_solver_state": True})
    for losses, _ in answers:
        assert losses == pytest.approx(expected, rel=1e-10)
