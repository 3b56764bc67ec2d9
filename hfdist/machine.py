"""What the machine is and how much of its memory was used."""

from __future__ import annotations

import platform
import resource
import sys

import torch


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, in bytes: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)  # Linux counts in KiB


def device_name(device: torch.device) -> str:
    """A name that a person recognises: "NVIDIA H100", "cpu (x86_64)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"
