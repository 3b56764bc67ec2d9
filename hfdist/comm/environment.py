"""Joining the process group that a launcher has prepared."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hfdist.comm.backends import backends_of_machine
from hfdist.comm.torch_comm import TorchCommunicator
from hfdist.errors import ConfigError, PeerError, first_line

_RENDEZVOUS_SECONDS = 120.0
"""Least time that ranks have to find each other: a cold start takes longer than a collective."""


class GroupCommunicator(TorchCommunicator):
    """A communicator that owns the default group of its process: closing it leaves that one too."""

    def close(self) -> None:
        super().close()
        if dist.is_initialized():
            dist.destroy_process_group()


def in_group_environment(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher like torchrun has told this process its rank."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def is_initialized() -> bool:
    """Whether this process has joined a default group already."""
    return dist.is_available() and dist.is_initialized()


def group_timeout() -> float:
    """Timeout of the program's own default group, in seconds."""
    world: Any = dist.group.WORLD
    # (A group without gloo is that of an accelerator alone.)
    accelerator = torch.accelerator.current_accelerator()
    device = torch.device("cpu") if accelerator is None or _has_gloo() else accelerator
    backend = world._get_backend(device)
    timeout: timedelta = backend.options._timeout
    return timeout.total_seconds()


def _has_gloo() -> bool:
    return "gloo" in str(dist.get_backend_config())


def join_environment(timeout_seconds: float) -> None:
    """Join the default group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, once.

    Raises:
        ConfigError: A variable is missing, or the port is taken.
        PeerError: The other ranks did not come.
    """
    if is_initialized():
        return
    missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set but {' and '.join(missing)} not: start the workers with "
            "torchrun, or unset RANK and WORLD_SIZE for a run in one process"
        )
    _init("env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_seconds)


def join(
    device: torch.device,
    *,
    rank: int,
    world_size: int,
    init_method: str,
    timeout_seconds: float,
) -> GroupCommunicator:
    """Join a new default group; `init_method` is a file:// or tcp:// address that all ranks share.

    Raises:
        ConfigError: The port is taken.
        PeerError: The other ranks did not come.
    """
    _init(init_method, rank, world_size, timeout_seconds)
    return GroupCommunicator(device, timeout_seconds)


def _init(init_method: str, rank: int, world_size: int, timeout_seconds: float) -> None:
    # gloo carries the rendezvous; the communicator makes the groups that carry vectors.
    try:
        dist.init_process_group(
            backends_of_machine(),
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=max(timeout_seconds, _RENDEZVOUS_SECONDS)),
        )
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            port = os.environ.get("MASTER_PORT", init_method)
            raise ConfigError(
                f"port {port} of the rendezvous is taken on this machine: choose another with "
                "`torchrun --master-port`, or let `torchrun --standalone` pick a free one"
            ) from error
        raise PeerError(
            f"rank {rank} of {world_size} could not join the group: the others did not come, or their "
            f"address cannot be reached; see --rdzv-endpoint of torchrun ({reason})"
        ) from error


def record_failure(error: BaseException) -> None:
    """Tell torchrun's agent, where there is one, which error ended this process."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)


_stores: list[dist.TCPStore] = []  # they serve as long as they are kept


def serve_store(host: str, port: int, world_size: int) -> None:
    """Start the store where ranks meet, on rank 0, before the group is made; it listens at `host` alone,
    where torch's own would listen at all addresses of the machine."""
    with socket.create_server((host, port)) as listener:
        store = dist.TCPStore(
            host,
            port,
            world_size,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,  # torch's own, at the same port, joins it
            master_listen_fd=os.dup(listener.fileno()),
        )
    _stores.append(store)
