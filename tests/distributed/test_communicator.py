"""One suite for every communicator, on 1 to 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from hfdist.comm import Communicator, SerialCommunicator
from hfdist.errors import ReplicaError
from hfdist.training.consistency import check_replicas

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

P = 103  # a multiple of no world size


def vector(rank: int, seed: int = 0) -> Tensor:
    return torch.randn(
        P, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * seed + rank)
    )


def conformance(comm: Communicator) -> dict[str, Any]:
    """Everything that the protocol promises; returns what ranks compare."""
    W, r = comm.world_size, comm.rank
    expected = torch.stack([vector(k) for k in range(W)]).sum(0)

    mine = vector(r)
    assert comm.all_reduce(mine) is mine
    torch.testing.assert_close(mine, expected)

    whole = vector(r)
    with comm.overlapped_all_reduce() as start:
        start(whole[60:])
        start(whole[:60])
    torch.testing.assert_close(whole, expected)

    scalars = torch.tensor([1.0, float(r)], dtype=torch.float64)
    assert comm.all_reduce(scalars).tolist() == [W, W * (W - 1) / 2]

    assert comm.is_rank_0 == (r == 0)
    assert comm.broadcast_object({"rank": r, "text": "x" * 5000}) == {"rank": 0, "text": "x" * 5000}
    assert comm.all_gather_object((r, "y" * (r * 3000))) == [
        (k, "y" * (k * 3000)) for k in range(W)
    ]
    comm.barrier()

    n = comm.shard_size(P)
    assert n == -(-P // W)
    shard = comm.reduce_scatter(vector(r))
    assert shard.shape == (n,)
    torch.testing.assert_close(comm.all_gather(shard, P), expected)
    padded = torch.nn.functional.pad(expected, (0, n * W - P))
    torch.testing.assert_close(shard, padded[r * n : (r + 1) * n])

    assert not check_replicas(comm, [expected], flag=False)
    assert check_replicas(comm, [expected], flag=r == W - 1)
    return {"bits": mine.numpy().tobytes(), "overlapped": whole.numpy().tobytes()}


def test_serial() -> None:
    conformance(SerialCommunicator())
    assert SerialCommunicator().take_counters() == {}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks(world_size: int) -> None:
    answers = on_ranks(world_size, conformance)
    assert all(answer == answers[0] for answer in answers)  # bitwise equal on all


def count(comm: Communicator) -> dict[str, float]:
    comm.take_counters()
    comm.all_reduce(torch.zeros(1000))
    comm.all_reduce(torch.zeros(2, dtype=torch.float64))
    with comm.overlapped_all_reduce() as start:
        for bucket in torch.zeros(300).split(100):
            start(bucket)
    comm.broadcast_object(1)
    return comm.take_counters()


def test_calls_bytes_and_seconds_are_counted() -> None:
    for counters in on_ranks(2, count):
        assert counters["vector_sums"] == 2  # the overlapped one is one, whatever its buckets
        assert counters["scalar_sums"] == 1
        assert counters["sum_bytes"] == 4000 + 16 + 1200
        assert counters["object_calls"] == 1
        assert counters["seconds"] > 0


def differ(comm: Communicator) -> str:
    tensors = [torch.ones(10), torch.zeros(5, dtype=torch.float64)]
    if comm.rank == 2:
        tensors[1][3] = torch.nextafter(tensors[1][3], torch.tensor(1.0, dtype=torch.float64))
    try:
        check_replicas(comm, tensors)
    except ReplicaError as error:
        return str(error)
    return ""


def test_a_single_bit_is_found_and_the_rank_named() -> None:
    for message in on_ranks(4, differ):
        assert "rank 2 differ" in message


def fail(comm: Communicator) -> None:
    if comm.rank == 1:
        raise ValueError("mine")
    comm.barrier()


def test_a_rank_that_raises_is_the_one_that_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 1 of 3: ValueError: mine"):
        on_ranks(3, fail)
