"""Communicators: the only home of `torch.distributed`."""

from hfdist.comm.communicator import Communicator, SerialCommunicator
from hfdist.comm.torch_comm import TorchCommunicator

__all__ = ["Communicator", "SerialCommunicator", "TorchCommunicator"]
