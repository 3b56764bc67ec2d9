"""Which backend of `torch.distributed` carries the vectors of a device: what torch's own table says."""

from __future__ import annotations

import torch
import torch.distributed as dist

HOST = "gloo"
"""Carries what lies in the host's memory, on every machine."""


def backend_of(device: torch.device) -> str | None:
    """The backend that sums vectors where they lie; None: they have to go by way of the host."""
    if device.type == "cpu":
        return HOST
    try:
        backend = dist.get_default_backend_for_device(device)
    except ValueError:
        return None
    # (torch's table names gloo for devices whose memory it does not reach.)
    return backend if backend != HOST and dist.is_backend_available(backend) else None


def backends_of_machine() -> str:
    """Of a default group: the host's, and that of the machine's accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    backend = None if accelerator is None else backend_of(accelerator)
    if accelerator is None or backend is None:
        return HOST
    return f"cpu:{HOST},{accelerator.type}:{backend}"
