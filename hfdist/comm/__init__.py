"""Communicators: the only home of `torch.distributed`."""

from hfdist.comm.communicator import Communicator, SerialCommunicator

__all__ = ["Communicator", "SerialCommunicator"]
