"""Communicators: the only home of `torch.distributed`."""

import torch

from hfdist.comm.communicator import Communicator, SerialCommunicator

__all__ = ["Communicator", "SerialCommunicator", "current_communicator"]


def current_communicator(device: torch.device) -> Communicator:
    """All ranks of `torch.distributed` where the program has initialised it; else this process alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from hfdist.comm.torch_comm import TorchCommunicator

        return TorchCommunicator(device)
    return SerialCommunicator(device)
