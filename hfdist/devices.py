"""Which device a rank computes on, what it is called, how much of its memory was used."""

from __future__ import annotations

import platform
import resource
import sys

import torch

from hfdist.errors import ConfigError


def resolve(device: str, local_rank: int, local_world_size: int | None = None) -> torch.device:
    """The device of a rank: one GPU each among those that CUDA_VISIBLE_DEVICES leaves, or the CPU.

    Args:
        device: "auto" (GPUs where there are any, else the CPU), "cpu", "cuda", or one GPU, "cuda:1".
        local_rank: The rank's index among those of its machine.
        local_world_size: Number of ranks on this machine; at least `local_rank + 1` by default.

    Raises:
        ConfigError: There is no such device, or too few GPUs for the ranks.
    """
    ranks = max(local_rank + 1, local_world_size or 1)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device is {device!r}: it must be auto, cpu, cuda, or one GPU like cuda:0"
        ) from error
    if asked.type == "cpu":
        return torch.device("cpu")
    if asked.type != "cuda":
        # Losses and weights are summed in float64, which Apple's mps (for one) does not have.
        raise ConfigError(f"device {device!r} is not supported: use auto, cpu or cuda")
    return _gpu(device, asked.index, local_rank, ranks)


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


def _gpu(device: str, index: int | None, local_rank: int, ranks: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index is None:
        if ranks > gpus:
            raise ConfigError(
                f"{_count(ranks, 'worker')} but {_count(gpus, 'GPU')} on this machine: every worker "
                f"needs a GPU of its own; lower launch.workers to {gpus}, or set device=cpu"
                if gpus
                else f"device {device!r}: {_count(ranks, 'worker')} but 0 GPUs on this machine: "
                "set device=cpu, or see why torch.cuda.is_available() is false"
            )
        return torch.device("cuda", local_rank)
    if index >= gpus:
        raise ConfigError(
            f"device is {device!r} but this machine has {_count(gpus, 'GPU')}"
            + (f" (cuda:0 to cuda:{gpus - 1})" if gpus > 1 else "")
        )
    if ranks > 1:
        raise ConfigError(
            f"device {device!r} names 1 GPU for {ranks} workers: set device=cuda, and "
            "CUDA_VISIBLE_DEVICES to choose among the GPUs"
        )
    return torch.device("cuda", index)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
