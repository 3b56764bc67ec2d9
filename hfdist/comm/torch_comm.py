"""The communicator of a process group: nccl between NVIDIA's GPUs, gloo between CPUs."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hfdist.comm.backends import HOST, backend_of
from hfdist.comm.counters import Counters
from hfdist.errors import PeerError

T = TypeVar("T")

# The older names are deprecated since torch 2.14, the newer ones are not in every supported version.
_torch_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_torch_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)

# Not torch's broadcast_object_list and all_gather_object: those always send a length first. A step has
# three small objects, for which that takes 1.9 and 2.2 times as long (two ranks, gloo).
_INLINE = 1016
"""Bytes of a pickled object that travel with its length in one message; longer ones take a second."""

_PEER_FAILURES = ("gloo/transport", "timed out", "timeout", "connection closed", "connection reset")
"""What the messages of a dead or stalled peer contain; any other RuntimeError is a programming error."""


class TorchCommunicator:
    """Collectives of `torch.distributed`, on process groups of its own.

    Its groups are apart from those of the user's program, so that the two never mix messages and the
    timeout is this run's. Constructing it is collective over the default group, whose ranks it joins.

    Args:
        device: Where summed vectors live. torch's table names the backend of an accelerator; where it has
            none, vectors go by way of the host.
        timeout_seconds: A collective that takes longer means that a peer is dead or stalls.
        shares_device: Whether several ranks use one GPU, which nccl refuses: by way of the host then.

    Raises:
        PeerError: (every collective) Another rank died, or did not come within the timeout.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        timeout_seconds: float = 60.0,
        shares_device: bool = False,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: see hfdist.comm.environment.join"
            )
        self.device = torch.device(device)
        self.timeout_seconds = timeout_seconds
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._counters = Counters()
        self._closed = False
        with self._guarded("joining the group"):
            self._objects = self._new_group(HOST)
            # Objects stay on the host's group: sending a decision must not wait for the device.
            backend = None if shares_device else backend_of(self.device)
            self._vectors = self._objects
            if backend is not None and backend != HOST:
                self._vectors = self._new_group(backend)
            self._by_host = backend is None

    def _new_group(self, backend: str) -> dist.ProcessGroup:
        made: Any = dist.new_group(timeout=timedelta(seconds=self.timeout_seconds), backend=backend)
        return made

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._counters.add_sum(tensor.numel())
        if tensor.numel() == 0:
            return tensor
        with self._counted("sum", tensor.nbytes):
            # gloo and nccl want dense tensors, and neither knows int16.
            wire = tensor.to(torch.int32) if tensor.dtype == torch.int16 else tensor
            wire = self._wire(wire.contiguous())
            dist.all_reduce(wire, group=self._vectors)
            if wire is not tensor:
                tensor.copy_(wire)
        return tensor

    @contextmanager
    def overlapped_all_reduce(self) -> Iterator[Callable[[Tensor], None]]:
        pending: list[tuple[dist.Work, Tensor, Tensor]] = []  # work, what travels, bucket
        seconds = 0.0

        def start(bucket: Tensor) -> None:
            nonlocal seconds
            if not bucket.is_contiguous():
                raise ValueError("a bucket must be contiguous: its sum is written in place")
            if bucket.numel() == 0:
                return
            began = time.perf_counter()
            with self._guarded("sum"):
                wire = self._wire(bucket)
                work = dist.all_reduce(wire, group=self._vectors, async_op=True)
            pending.append((work, wire, bucket))
            seconds += time.perf_counter() - began

        # An exception in the body leaves at once: the peers learn of it from the closed connection.
        yield start
        began = time.perf_counter()
        with self._guarded("sum"):
            for work, wire, bucket in pending:
                work.wait()
                if wire is not bucket:
                    bucket.copy_(wire)
        seconds += time.perf_counter() - began
        self._counters.add_sum(sum(bucket.numel() for *_, bucket in pending))
        self._counters.add("sum", sum(bucket.nbytes for *_, bucket in pending), seconds)

    def broadcast_object(self, value: T) -> T:
        message = _frame(value) if self.is_rank_0 else torch.empty(8 + _INLINE, dtype=torch.uint8)
        rank_0 = dist.get_global_rank(self._objects, 0)
        with self._counted("object", 0) as count:
            head = message[: 8 + _INLINE].clone()
            dist.broadcast(head, src=rank_0, group=self._objects)
            count(head.nbytes)
            size = _framed_size(head)
            if size > _INLINE:
                if not self.is_rank_0:
                    message = torch.empty(8 + size, dtype=torch.uint8)
                dist.broadcast(message, src=rank_0, group=self._objects)
                count(message.nbytes)
            elif not self.is_rank_0:
                message = head
        return value if self.is_rank_0 else _unframe(message)

    def all_gather_object(self, value: T) -> list[T]:
        message = _frame(value)
        with self._counted("object", 0) as count:
            rows = self._gather_bytes(message[: 8 + _INLINE])
            count(rows.nbytes)
            longest = max(map(_framed_size, rows))
            if longest > _INLINE:
                padded = torch.zeros(8 + longest, dtype=torch.uint8)
                padded[: len(message)] = message
                rows = self._gather_bytes(padded)
                count(rows.nbytes)
        return [_unframe(row) for row in rows]

    def _gather_bytes(self, message: Tensor) -> Tensor:
        rows = torch.empty(self.world_size, len(message), dtype=torch.uint8)  # [W, bytes]
        _torch_all_gather(rows.view(-1), message.contiguous(), group=self._objects)
        return rows

    def barrier(self) -> None:
        with self._counted("barrier", 0):
            dist.barrier(group=self._objects)

    def shard_size(self, numel: int) -> int:
        return -(-numel // self.world_size)

    def reduce_scatter(self, vector: Tensor) -> Tensor:
        n = self.shard_size(vector.numel())
        shard = vector.new_empty(n)
        if n == 0:
            return shard
        with self._counted("reduce_scatter", vector.nbytes):
            padding = n * self.world_size - vector.numel()
            whole = (
                torch.nn.functional.pad(vector, (0, padding)) if padding else vector.contiguous()
            )
            wire = self._wire(shard)
            _torch_reduce_scatter(wire, self._wire(whole), group=self._vectors)
            if wire is not shard:
                shard.copy_(wire)
        return shard

    def all_gather(self, shard: Tensor, numel: int) -> Tensor:
        n = self.shard_size(numel)
        if shard.shape != (n,):
            raise ValueError(f"shard has shape {tuple(shard.shape)}: it must be ({n},)")
        whole = shard.new_empty(n * self.world_size)
        if n:
            with self._counted("all_gather", whole.nbytes):
                wire = self._wire(whole)
                _torch_all_gather(wire, self._wire(shard.contiguous()), group=self._vectors)
                if wire is not whole:
                    whole.copy_(wire)
        return whole[:numel]

    def _wire(self, tensor: Tensor) -> Tensor:
        """What the vectors' group can carry: the tensor, or a copy of it in the host's memory."""
        return tensor.cpu() if self._by_host else tensor

    def take_counters(self) -> dict[str, float]:
        return self._counters.take()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not dist.is_initialized():  # the user's program was faster
            return
        for group in {id(g): g for g in (self._vectors, self._objects)}.values():
            dist.destroy_process_group(group)

    @contextmanager
    def _counted(self, kind: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
        def more(extra: int) -> None:
            nonlocal num_bytes
            num_bytes += extra

        began = time.perf_counter()
        with self._guarded(kind):
            yield more
        self._counters.add(kind, num_bytes, time.perf_counter() - began)

    @contextmanager
    def _guarded(self, operation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip()
            if not isinstance(error, dist.DistError) and not any(
                sign in reason.lower() for sign in _PEER_FAILURES
            ):
                raise
            raise PeerError(
                f"rank {self.rank} of {self.world_size}: {operation} did not finish, another rank died "
                f"or did not answer within launch.timeout_seconds={self.timeout_seconds:g}. Its own "
                "error is in the run's logs folder; `hfdist resume RUN_DIR` goes on from the newest "
                f"checkpoint. ({reason.splitlines()[0] if reason else type(error).__name__})"
            ) from error


def _frame(value: object) -> Tensor:
    """Length and pickle of an object, at least 8 + _INLINE bytes."""
    data = pickle.dumps(value)
    framed = bytearray(len(data).to_bytes(8, "little") + data)
    return torch.frombuffer(framed.ljust(8 + _INLINE, b"\0"), dtype=torch.uint8)


def _framed_size(message: Tensor) -> int:
    return int.from_bytes(message[:8].numpy().tobytes(), "little")


def _unframe(message: Tensor) -> Any:
    return pickle.loads(message[8 : 8 + _framed_size(message)].numpy().tobytes())
