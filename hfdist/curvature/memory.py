"""How much memory the parts of a step take, and how much there is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from hfdist.curvature.dispatch import Watch
from hfdist.curvature.kronecker.calls import MAX_VECTOR
from hfdist.curvature.kronecker.factors import MAX_SIZE
from hfdist.curvature.params import ParameterVector
from hfdist.devices import is_accelerator, unused_memory
from hfdist.optim.memory import solver_vectors
from hfdist.optim.options import HFOptions

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


def memory_left(device: torch.device, num_processes: int = 1, reserved: int = 0) -> int:
    """Bytes that this process may well use for graphs, of a machine that others share.

    Args:
        device: Where the graphs are.
        num_processes: That share the host's memory.
        reserved: Bytes of an accelerator that other parts of the step will need.
    """
    if is_accelerator(device):
        return max(int(0.8 * unused_memory(device)) - reserved, 0)
    import psutil

    free = psutil.virtual_memory().available
    try:  # in a container
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return int(0.5 * max(free, 0) / num_processes)


def reserved_bytes(params: ParameterVector, options: HFOptions, world_size: int = 1) -> int:
    """Most bytes that solver and preconditioner take on a rank's device, by the formulas that the guide
    states.

    Args:
        params: The parameters [P].
        options: The step's.
        world_size: Ranks that share the solver's vectors where `shard_solver_state` is true.
    """
    shares = world_size if options.shard_solver_state else 1
    n, itemsize = -(-params.numel // shares), params.dtype.itemsize
    of_solver = solver_vectors(options, n, itemsize) * n
    if shares > 1:  # whole vectors of a product: its argument, and its result
        of_solver += 2 * params.numel
    return int(itemsize * (of_solver + preconditioner_numbers(params, options)))


def preconditioner_numbers(params: ParameterVector, options: HFOptions) -> int:
    """Most numbers that a preconditioner takes: four times the factors of kfac and 2 P, where a weight [out,
    in] has factors of (in + 1)^2 and out^2 numbers, at most 2048 a row, six times and 5 P of ekfac; 4 P of a
    diagonal; 2 P for each vector of nystrom, 6 P for each pair of lbfgs."""
    P, name = params.numel, options.preconditioner
    if name in ("kfac", "auto", "ekfac"):
        of_factors, of_vectors = (6, 5) if name == "ekfac" else (4, 2)
        return of_factors * sum(_of_factors(t) for t in params.tensors) + of_vectors * P
    if name in ("nystrom", "lbfgs"):
        return P * (2 * options.nystrom_rank if name == "nystrom" else 6 * options.lbfgs_pairs)
    return 0 if name == "none" else 4 * P


def _of_factors(t: Tensor) -> int:
    if t.ndim < 2:
        return t.numel() * (t.numel() if t.numel() <= MAX_VECTOR else 1)
    rows, columns = t.shape[0], math.prod(t.shape[1:]) + 1
    return rows * min(rows, MAX_SIZE) + columns * min(columns, MAX_SIZE)
