"""How much memory a forward pass's graph takes, and how much there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from hfdist.curvature.dispatch import Watch
from hfdist.devices import is_accelerator, unused_memory

_CGROUP = Path("/sys/fs/cgroup")


class MemoryCounter(Watch):
    """Adds up what the operations inside the context return, views left out: an upper bound of what
    the graph of a forward pass keeps alive, and close to it, since most results are needed backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(func, OpOverload)
            and not func._schema.is_mutable
            and not any(r.alias_info is not None for r in func._schema.returns)
        ):
            self.num_bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def memory_left(device: torch.device, num_processes: int = 1) -> int:
    """Bytes that this process may well use for graphs, of a machine that others share."""
    if is_accelerator(device):
        return int(0.8 * unused_memory(device))
    import psutil

    free = psutil.virtual_memory().available
    try:  # in a container
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return int(0.5 * max(free, 0) / num_processes)
