"""Communicators: the only users of `torch.distributed`.

`TorchCommunicator` is loaded when it is first named: a run in one process has no use for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfdist.comm.communicator import Communicator, SerialCommunicator

if TYPE_CHECKING:
    from hfdist.comm.torch_comm import TorchCommunicator

__all__ = ["Communicator", "SerialCommunicator", "TorchCommunicator", "current_communicator"]


def __getattr__(name: str) -> Any:
    if name == "TorchCommunicator":
        from hfdist.comm.torch_comm import TorchCommunicator

        return TorchCommunicator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def current_communicator(device: torch.device | str = "cpu") -> Communicator:
    """The ranks of this program: all of `torch.distributed`'s where it is initialised, else this one.

    Collective where there are several ranks. The program's own timeout is kept: between two steps
    of a loop of one's own a rank may be away for longer than hfdist would wait.

    Raises:
        PeerError: Another rank did not come.
    """
    # Without a loaded torch.distributed nobody can have initialised it.
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return SerialCommunicator(device)
    from hfdist.comm.environment import group_timeout
    from hfdist.comm.torch_comm import TorchCommunicator

    return TorchCommunicator(device, timeout_seconds=group_timeout())
